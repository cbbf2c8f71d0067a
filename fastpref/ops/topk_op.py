"""The custom operators under `linear_topk_divergence`: logits of a few tokens, and the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.derivatives import first_derivative_only
from fastpref.ops.backend import multiply, statistics_dtype
from fastpref.ops.divergence_rows import product
from fastpref.ops.linear_logps_op import empty_gradients, incoming, rows_read
from fastpref.ops.operands import SCHEMA, Logits, Operands, register, spread, take
from fastpref.ops.softmax_rows import NO_TOKEN, softmax_blocks
from fastpref.ops.tiling import blocks, rows_per_gather


class Found(NamedTuple):
    """What the operator returns; what is not wanted is empty. Rows that are not read are 0."""

    logits: Tensor  # (N, K) of the tokens, of any token for `NO_TOKEN`
    # (N,) logsumexp of all other logits less the largest of them, which their sum would round;
    # -inf without any. Its derivative is that of the logsumexp. With ``rest``.
    rest: Tensor
    stats: Tensor  # (N, 2) the largest of these, and the entropy of their softmax; with ``rest``
    jacobian: Tensor  # (N, H) of the rest, with ``jacobian``; of the first n, if n rows are read
    rows: Tensor  # (N,) int64, which rows these are, if labels are chosen
    n_rows: Tensor  # (1,) int64 on the host: n, if labels are chosen


def logits_and_rest(*arguments: Any) -> tuple[Tensor, ...]:
    """Logits of ``token_ids`` (N, K), and what is left of the vocabulary: `Found`."""
    operands, (token_ids, wants_rest, wants_jacobian) = Operands.split(arguments)
    found, rows = Found(*_outputs(*arguments)), operands.rows()
    operands.note_rows(rows, found.rows, found.n_rows)
    token_ids, count = take(token_ids, rows), operands.hidden.shape[0]
    if operands.compacts():
        _check_tokens(token_ids, operands.weight.shape[0])
    operands, _ = operands.without_ignored()
    student = operands.logits(rows)
    logits = found.logits.new_empty(token_ids.shape)
    for some in _gathers(student, token_ids, logits.dtype):
        products = torch.bmm(some.weight, some.hidden.unsqueeze(2)).squeeze(2)
        if student.bias is not None:
            products += student.bias[some.token_ids]
        logits[some.rows] = student.transform.apply_(products)
    found = found._replace(logits=spread(logits, rows, count))
    if not wants_rest:
        return tuple(found)
    rest, stats = logits.new_empty(len(logits)), logits.new_empty(len(logits), 2)
    for block in softmax_blocks(student, rest.dtype, without=token_ids, damped=wants_jacobian):
        nothing = block.maximum == -torch.inf
        rest[block.rows] = block.others.log1p().masked_fill(nothing, -torch.inf)
        entropy = block.entropy.masked_fill(nothing, 0)
        stats[block.rows] = torch.stack((block.maximum, entropy), dim=1)
        if wants_jacobian:
            product(block.probabilities, student, found.jacobian[block.rows])
    found.jacobian[len(logits) :] = 0
    found.jacobian.mul_(student.transform.factor)
    return tuple(found._replace(rest=spread(rest, rows, count), stats=spread(stats, rows, count)))


def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    operands, (token_ids, wants_rest, wants_jacobian) = Operands.split(arguments)
    hidden, chosen = operands.hidden, operands.compacts()
    (count, width), dtype = hidden.shape, statistics_dtype(hidden.dtype)
    return Found(
        hidden.new_empty(token_ids.shape, dtype=dtype),
        hidden.new_empty(count if wants_rest else 0, dtype=dtype),
        hidden.new_empty(count if wants_rest else 0, 2, dtype=dtype),
        # Wide, so that a gradient is rounded once, as under `linear_logps`.
        hidden.new_empty(count, width if wants_jacobian else 0, dtype=dtype),
        hidden.new_empty(count if chosen else 0, dtype=torch.int64),
        hidden.new_empty(int(chosen), dtype=torch.int64, device="cpu" if chosen else hidden.device),
    )


topk_ops = register(
    "topk_logits",
    logits_and_rest,
    _outputs,
    f"({SCHEMA}, Tensor token_ids, bool rest, bool jacobian)"
    f" -> ({', '.join(['Tensor'] * len(Found._fields))})",
)


class _Totals(NamedTuple):
    """Sums of products, in the dtype of statistics; None where no gradient is wanted."""

    hidden: Tensor | None  # (n, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)

    def add_tokens(self, student: Logits, token_ids: Tensor, gradient: Tensor) -> None:
        """What the projections (n, K) on the tokens contribute."""
        for some in _gathers(student, token_ids, gradient.dtype):
            of_tokens, tokens = gradient[some.rows], some.token_ids.flatten()
            if self.hidden is not None:
                self.hidden[some.rows] += torch.bmm(of_tokens.unsqueeze(1), some.weight).squeeze(1)
            if self.weight is not None:
                products = of_tokens.unsqueeze(2) * some.hidden.unsqueeze(1)
                self.weight.index_add_(0, tokens, products.flatten(0, 1))
            if self.bias is not None:
                self.bias.index_add_(0, tokens, of_tokens.flatten())

    def add_rest(self, student: Logits, token_ids: Tensor, gradient: Tensor) -> None:
        """What all other projections contribute, from the gradient (n,) of the rest."""
        gradient = gradient * student.transform.factor
        for block in softmax_blocks(student, gradient.dtype, without=token_ids, damped=True):
            tile = block.probabilities.mul_(gradient[block.rows].unsqueeze(1))
            if self.hidden is not None:
                product(tile, student, self.hidden[block.rows])
            if self.weight is not None:
                hidden = student.hidden_of(block.rows)
                multiply(tile.T.to(hidden.dtype), hidden, self.weight, add=True)
            if self.bias is not None:
                self.bias.add_(tile.sum(0))


def gradients_of_operands(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not wanted."""
    operands, more = Operands.split(arguments)
    token_ids, from_logits, from_rest, logits, rows, n_rows, jacobian, *wanted = more
    rows = rows_read(operands, rows, n_rows)
    operands, _ = operands.without_ignored()
    token_ids, logits = (take(one, rows) for one in (token_ids, logits))
    student = operands.logits(rows)
    places, count = empty_gradients(*arguments), len(logits)
    wants_hidden, wants_weight, wants_bias = wanted
    totals = _Totals(
        logits.new_zeros(count, operands.hidden.shape[1]) if wants_hidden else None,
        logits.new_zeros(places[1].shape) if wants_weight else None,
        logits.new_zeros(places[2].shape) if wants_bias else None,
    )
    if from_rest is not None and jacobian.numel():
        assert totals.hidden is not None
        totals.hidden.copy_(jacobian[:count] * take(from_rest, rows).unsqueeze(1))
    elif from_rest is not None:
        totals.add_rest(student, token_ids, take(from_rest, rows))
    of_tokens = incoming(from_logits, rows, logits) * student.transform.slope(logits)
    totals.add_tokens(student, token_ids, of_tokens)
    if totals.hidden is not None:
        hidden = totals.hidden.to(places[0].dtype)
        totals = totals._replace(hidden=spread(hidden, rows, operands.hidden.shape[0]))
    return tuple(
        place if total is None else total.to(place.dtype)
        for place, total in zip(places, totals, strict=True)
    )


topk_backward_ops = register(
    "topk_logits_backward",
    gradients_of_operands,
    empty_gradients,
    f"({SCHEMA}, Tensor token_ids, Tensor? logits_gradient, Tensor? rest_gradient, Tensor logits, "
    "Tensor rows, Tensor n_rows, Tensor jacobian, "
    "bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)",
)


class _Gathered(NamedTuple):
    """Operands of some rows, in the dtype of statistics."""

    rows: slice
    token_ids: Tensor  # (k, K), any token for `NO_TOKEN`
    hidden: Tensor  # (k, H)
    weight: Tensor  # (k, K, H)


def _gathers(student: Logits, token_ids: Tensor, dtype: torch.dtype) -> Iterator[_Gathered]:
    """Every row, some at a time, with its tokens' rows of the weight."""
    (vocab_size, width), (count, tokens) = student.weight.shape, token_ids.shape
    like = student.hidden.new_empty(0, dtype=dtype)
    for rows in blocks(0, count, rows_per_gather(tokens * width, like)):
        ids = token_ids[rows].clamp(0, vocab_size - 1)
        weight = student.weight.index_select(0, ids.flatten()).to(dtype)
        hidden = student.hidden_of(rows).to(dtype)
        yield _Gathered(rows, ids, hidden, weight.view(*ids.shape, width))


def _check_tokens(token_ids: Tensor, vocab_size: int) -> None:
    outside = (token_ids != NO_TOKEN) & ((token_ids < 0) | (token_ids >= vocab_size))
    count = int(outside.sum())
    if count:
        raise ValueError(
            f"token_ids: expected values in [0, {vocab_size}) where a token is meant, "
            f"got {count} outside, the first of them {int(token_ids[outside][0])}"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, (token_ids, wants_rest, _) = Operands.split(inputs)
    found = Found(*output)
    ctx.mark_non_differentiable(*found[2:])
    ctx.set_materialize_grads(False)
    ctx.options, ctx.rest = operands[4:], wants_rest
    ctx.save_for_backward(
        *operands[:4], token_ids, found.logits, found.rows, found.n_rows, found.jacobian
    )


@first_derivative_only(
    "fastpref.linear_topk_divergence, linear_topk_expectation, linear_token_preference"
)
def _backward(
    ctx: Any, from_logits: Tensor | None, from_rest: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if from_logits is None and from_rest is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, token_ids, logits, rows, n_rows, jacobian = ctx.saved_tensors
    operands, wanted = Operands(*tensors, *ctx.options), ctx.needs_input_grad[:3]
    if not ctx.rest:  # what was not wanted may have gradients without an element
        from_rest = None
    op = topk_backward_ops.of(operands)
    given = from_logits, from_rest, logits, rows, n_rows, jacobian
    found = op(*operands, token_ids, *given, *wanted)
    nothing = (None,) * (len(ctx.needs_input_grad) - 3)
    return *(one if want else None for one, want in zip(found, wanted, strict=True)), *nothing


for op in topk_ops:
    op.register_autograd(_backward, setup_context=_setup_context)
