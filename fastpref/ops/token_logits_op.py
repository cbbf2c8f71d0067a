"""The custom operator under `linear_topk_divergence`: logits of a few tokens in every row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import statistics_dtype
from fastpref.ops.linear_logps_op import empty_gradients, rows_read
from fastpref.ops.operands import SCHEMA, Operands, register, spread, take
from fastpref.ops.tiling import blocks, rows_per_gather


class Found(NamedTuple):
    """What the operator returns; all below the logits is for the backward pass."""

    logits: Tensor  # (N, K), 0 in rows that are not read
    rows: Tensor  # (N,) int64, which of them are, if labels are chosen
    n_rows: Tensor  # (1,) int64 on the host: how many


class _Gathered(NamedTuple):
    """The operands of some rows, in the dtype of statistics."""

    rows: slice  # of those that are read
    token_ids: Tensor  # (k, K)
    hidden: Tensor  # (k, H)
    weight: Tensor  # (k, K, H)


def token_logits(*arguments: Any) -> tuple[Tensor, ...]:
    """Logits of ``token_ids`` (N, K): `Found`. With ``compact`` ids outside are refused."""
    operands, (token_ids,) = Operands.split(arguments)
    found, rows = Found(*_outputs(*arguments)), operands.rows()
    operands.note_rows(rows, found.rows, found.n_rows)
    if operands.compacts():
        _check_tokens(take(token_ids, rows), operands.weight.shape[0])
    operands, _ = operands.without_ignored()
    logits = found.logits[: operands.count(rows)]
    for some in _gathers(operands, rows, token_ids, logits):
        products = torch.bmm(some.weight, some.hidden.unsqueeze(2)).squeeze(2)
        if operands.bias is not None:
            products += operands.bias[some.token_ids]
        logits[some.rows] = operands.transform().apply_(products)
    if rows is not None:
        found = found._replace(logits=spread(logits, rows, operands.hidden.shape[0]))
    return tuple(found)


def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    operands, (token_ids,) = Operands.split(arguments)
    hidden, chosen = operands.hidden, operands.compacts()
    return Found(
        hidden.new_empty(token_ids.shape, dtype=statistics_dtype(hidden.dtype)),
        hidden.new_empty(hidden.shape[0] if chosen else 0, dtype=torch.int64),
        hidden.new_empty(int(chosen), dtype=torch.int64, device="cpu" if chosen else hidden.device),
    )


token_logits_ops = register(
    "token_logits",
    token_logits,
    _outputs,
    f"({SCHEMA}, Tensor token_ids) -> (Tensor, Tensor, Tensor)",
)


def gradients_of_operands(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not wanted."""
    operands, more = Operands.split(arguments)
    token_ids, incoming, logits, rows, n_rows, *wanted = more
    rows = rows_read(operands, rows, n_rows)
    wants_hidden, wants_weight, wants_bias = wanted
    operands, _ = operands.without_ignored()
    gradient = take(incoming, rows) * operands.transform().slope(take(logits, rows))
    hidden_gradient, *of_head = empty_gradients(*arguments)
    # Sums over rows and tokens, in the dtype of statistics.
    total = gradient.new_empty(len(gradient), operands.hidden.shape[1]) if wants_hidden else None
    weight_total, bias_total = (torch.zeros_like(one, dtype=gradient.dtype) for one in of_head)
    for some in _gathers(operands, rows, token_ids, gradient):
        of_tokens, tokens = gradient[some.rows], some.token_ids.flatten()
        if total is not None:
            total[some.rows] = torch.bmm(of_tokens.unsqueeze(1), some.weight).squeeze(1)
        if wants_weight:
            products = of_tokens.unsqueeze(2) * some.hidden.unsqueeze(1)
            weight_total.index_add_(0, tokens, products.flatten(0, 1))
        if wants_bias:
            bias_total.index_add_(0, tokens, of_tokens.flatten())
    if total is not None:
        total = total.to(hidden_gradient.dtype)
        hidden_gradient = spread(total, rows, operands.hidden.shape[0])
    return hidden_gradient, *(
        one.to(place.dtype) for one, place in zip((weight_total, bias_total), of_head, strict=True)
    )


token_logits_backward_ops = register(
    "token_logits_backward",
    gradients_of_operands,
    empty_gradients,
    f"({SCHEMA}, Tensor token_ids, Tensor gradient, Tensor logits, Tensor rows, Tensor n_rows, "
    "bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)",
)


def _gathers(
    operands: Operands, rows: Tensor | None, token_ids: Tensor, like: Tensor
) -> Iterator[_Gathered]:
    """Every row that is read, some at a time: with its tokens' rows of the weight."""
    (vocab_size, width), tokens = operands.weight.shape, token_ids.shape[1]
    for block in blocks(0, operands.count(rows), rows_per_gather(tokens * width, like)):
        chosen = block if rows is None else rows[block]
        ids = token_ids[chosen].clamp(0, vocab_size - 1)
        weight = operands.weight.index_select(0, ids.flatten()).to(like.dtype)
        yield _Gathered(
            block, ids, operands.hidden[chosen].to(like.dtype), weight.view(*ids.shape, width)
        )


def _check_tokens(token_ids: Tensor, vocab_size: int) -> None:
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    count = int(outside.sum())
    if count:
        raise ValueError(
            f"token_ids: expected values in [0, {vocab_size}) where token_logps is above -inf, "
            f"got {count} outside, the first of them {int(token_ids[outside][0])}"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, (token_ids,) = Operands.split(inputs)
    found = Found(*output)
    ctx.mark_non_differentiable(found.rows, found.n_rows)
    ctx.set_materialize_grads(False)
    ctx.options = operands[4:]
    ctx.save_for_backward(*operands[:4], token_ids, *found)


def _backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, token_ids, logits, rows, n_rows = ctx.saved_tensors
    operands, wanted = Operands(*tensors, *ctx.options), ctx.needs_input_grad[:3]
    op = token_logits_backward_ops.of(operands)
    found = op(*operands, token_ids, gradient, logits, rows, n_rows, *wanted)
    nothing = (None,) * (len(ctx.needs_input_grad) - 3)
    return *(one if want else None for one, want in zip(found, wanted, strict=True)), *nothing


for op in token_logits_ops:
    op.register_autograd(_backward, setup_context=_setup_context)
