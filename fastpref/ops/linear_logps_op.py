"""The custom operator under `linear_logps` and `linear_logsumexp`: schema, fakes and autograd.

Below autograd nobody can see ``requires_grad``, so the callers say with ``jacobian`` whether the
hidden states alone need a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.ops.backend import jacobian_dtype, operand_dtype, statistics_dtype, uses_triton
from fastpref.ops.backward import gradients
from fastpref.ops.forward import statistics, statistics_and_jacobian, statistics_by_kernel
from fastpref.ops.operands import SCHEMA, Operands, spread, take
from fastpref.ops.tiling import TileCache, tile_grid


def logps_and_more(*arguments: Any) -> tuple[Tensor, ...]:
    """Log-probabilities (N,), logsumexp (N,), Jacobian (N, H), stats (N, 3), kept tiles (flat).

    The stats are entropy, the largest logit and the label's, 0 in rows that ``compact`` leaves out.
    What is not wanted is empty or has no columns: log-probabilities without ``labels``, the
    Jacobian without ``jacobian``, the stats without ``stats``, the tiles without ``scratch_bytes``.
    """
    operands, (wants_jacobian, wants_stats, scratch_bytes) = Operands.split(arguments)
    rows, count = operands.rows(), operands.hidden.shape[0]
    if operands.count(rows) == 0:
        return tuple(output.zero_() for output in _outputs(*arguments))
    cache = _cache(operands, scratch_bytes)
    jacobian = _jacobian(operands.hidden, operands.count(rows), 0)
    if wants_jacobian:
        found, jacobian = statistics_and_jacobian(operands.logits(rows), stats=wants_stats)
    elif uses_triton(operands.hidden) and not scratch_bytes:
        found = statistics_by_kernel(operands, rows, stats=wants_stats)
    else:
        found = statistics(operands.logits(rows), cache=cache, stats=wants_stats)

    logps, lse, stats = found
    if operands.labels is not None and not operands.compact:
        ignored = operands.labels == operands.ignore_index
        logps, lse = logps.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)
        jacobian.masked_fill_(ignored.unsqueeze(1), 0)
    return *(spread(one, rows, count) for one in (logps, lse, jacobian, stats)), cache


linear_logps_op = torch.library.custom_op(
    "fastpref::linear_logps",
    logps_and_more,
    mutates_args=(),
    schema=f"({SCHEMA}, bool jacobian, bool stats, int scratch_bytes)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@linear_logps_op.register_fake
def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    operands, (wants_jacobian, wants_stats, scratch_bytes) = Operands.split(arguments)
    hidden = operands.hidden
    (count, width), dtype = hidden.shape, statistics_dtype(hidden.dtype)
    return (
        hidden.new_empty(0 if operands.labels is None else count, dtype=dtype),
        hidden.new_empty(count, dtype=dtype),
        _jacobian(hidden, count, width if wants_jacobian else 0),
        hidden.new_empty(count, 3 if wants_stats else 0, dtype=dtype),
        _cache(operands, scratch_bytes),
    )


def gradients_of_operands(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not wanted."""
    operands, more = Operands.split(arguments)
    logps_gradient, lse_gradient, logps, lse, cache, wants_hidden, wants_weight, wants_bias = more
    rows = operands.rows()
    if operands.count(rows) == 0:
        return tuple(gradient.zero_() for gradient in _gradients(*arguments))

    lse = take(lse, rows)
    from_lse = _incoming(lse_gradient, rows, lse)
    probability_coefficients, label_coefficients = from_lse, torch.zeros_like(from_lse)
    if operands.labels is not None:
        logps = take(logps, rows)
        from_logps = _incoming(logps_gradient, rows, lse)
        ignored = None
        if not operands.compact:
            ignored = operands.labels == operands.ignore_index
            from_lse, from_logps = (one.masked_fill(ignored, 0) for one in (from_lse, from_logps))
        probability_coefficients = from_lse - from_logps
        label_coefficients = from_lse * logps.exp() - from_logps * torch.expm1(logps)
        if ignored is not None:
            # Their coefficients are 0, which an exponential that overflows would make NaN. With
            # these every exponential is 0, and the label's logit, the sum of both, is finite.
            greatest = torch.finfo(lse.dtype).max
            lse, logps = lse.masked_fill(ignored, greatest), logps.masked_fill(ignored, -greatest)
    # The hidden states' gradient has no room among all rows before that of labelled ones is known.
    hidden_gradient, weight_gradient, bias_gradient = _gradients(
        *arguments[:-3], False, wants_weight, wants_bias
    )
    total = lse.new_empty(len(lse), operands.hidden.shape[1]) if wants_hidden else None
    gradients(
        operands.logits(rows),
        logps,
        lse,
        probability_coefficients,
        label_coefficients,
        cache=cache,
        hidden_gradient=total,
        weight_gradient=weight_gradient if wants_weight else None,
        bias_gradient=bias_gradient if wants_bias else None,
    )
    if total is not None:
        hidden_gradient = spread(total.to(operands.hidden.dtype), rows, operands.hidden.shape[0])
    return hidden_gradient, weight_gradient, bias_gradient


linear_logps_backward_op = torch.library.custom_op(
    "fastpref::linear_logps_backward",
    gradients_of_operands,
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor? logps_gradient, Tensor? lse_gradient, Tensor logps, Tensor lse, "
    "Tensor cache, bool wants_hidden, bool wants_weight, bool wants_bias)"
    " -> (Tensor, Tensor, Tensor)",
)


@linear_logps_backward_op.register_fake
def _gradients(hidden: Tensor, weight: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, wants_hidden, wants_weight, wants_bias = more
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(weight.shape[:1] if wants_bias else (0,)),
    )


@torch.library.custom_op("fastpref::scaled_jacobian", mutates_args=())
def scaled_jacobian_op(gradient: Tensor, jacobian: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of hidden (N, H) from that of the log-probabilities (N,) and their Jacobian (N, H).

    It is rounded to ``dtype`` once, after the product: a float16 gradient is often within range
    only by the loss scale that arrives with ``gradient``.

    An operator without a derivative of its own: the Jacobian depends on the hidden states, so what
    autograd would make of a second derivative here is wrong, and it says so instead.
    """
    scaled = torch.empty_like(jacobian, dtype=dtype)
    return torch.mul(gradient.unsqueeze(1), jacobian, out=scaled)


@scaled_jacobian_op.register_fake
def _(gradient: Tensor, jacobian: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(jacobian, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, _ = Operands.split(inputs)
    logps, lse, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.options = operands[4:]
    jacobian, _, cache = others
    ctx.save_for_backward(*operands[:4], logps, lse, jacobian, cache)


def _backward(
    ctx: Any, logps_gradient: Tensor | None, lse_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, logps, lse, jacobian, cache = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    nothing = (None,) * (len(ctx.needs_input_grad) - 3)
    # The Jacobian is that of the log-probabilities, or without labels of the logsumexp.
    own, other = logps_gradient, lse_gradient
    if labels is None:
        own, other = other, own
    if jacobian.numel() and own is not None and other is None:
        return scaled_jacobian_op(own, jacobian, hidden.dtype), None, None, *nothing
    found = linear_logps_backward_op(
        hidden, weight, bias, labels, *ctx.options,
        logps_gradient, lse_gradient, logps, lse, cache, *wanted,
    )  # fmt: skip
    return *(one if want else None for one, want in zip(found, wanted, strict=True)), *nothing


linear_logps_op.register_autograd(_backward, setup_context=_setup_context)


def _jacobian(hidden: Tensor, count: int, width: int) -> Tensor:
    return hidden.new_empty(count, width, dtype=jacobian_dtype(hidden.dtype))


def _cache(operands: Operands, scratch_bytes: int) -> Tensor:
    hidden = operands.hidden
    if not scratch_bytes or not hidden.shape[0]:
        return hidden.new_empty(0, dtype=torch.uint8)
    numbers = hidden.new_empty(0, dtype=statistics_dtype(hidden.dtype))
    grid = tile_grid(hidden.shape[0], operands.weight.shape[0], numbers)
    everything = TileCache(hidden, grid, operand_dtype(hidden), numbers.dtype).bytes_of_all()
    return hidden.new_empty(min(scratch_bytes, everything), dtype=torch.uint8)


def _incoming(gradient: Tensor | None, rows: Tensor | None, like: Tensor) -> Tensor:
    """The gradient (n,) of some rows' numbers: zeros where none came, contiguous for kernels."""
    return torch.zeros_like(like) if gradient is None else take(gradient, rows).contiguous()
