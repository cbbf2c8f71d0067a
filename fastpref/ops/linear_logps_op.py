"""The custom operator under `linear_logps` and `linear_logsumexp`: schema, fakes and autograd.

Below autograd nobody can see ``requires_grad``, so the callers say with ``jacobian`` whether the
hidden states alone need a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.ops.backend import uses_triton
from fastpref.ops.backward import gradients
from fastpref.ops.cache import TileCache
from fastpref.ops.forward import Statistics, statistics, statistics_and_jacobian
from fastpref.ops.matmul import jacobian_dtype, operand_dtype, statistics_dtype
from fastpref.ops.rows import labelled_rows
from fastpref.ops.tiling import tile_grid
from fastpref.ops.transform import LogitTransform


@torch.library.custom_op("fastpref::linear_logps", mutates_args=())
def linear_logps_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (N,) int64
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compact: bool,
    jacobian: bool,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities (N,), logsumexp (N,), Jacobian (N, H) and a `TileCache`'s buffer (flat).

    What is not wanted is empty: log-probabilities without ``labels``, the Jacobian without
    ``jacobian``, the cache without ``scratch_bytes``.
    """
    transform = LogitTransform(temperature, logit_scale, softcap)
    rows = _rows(labels, weight, ignore_index, compact)
    count = hidden.shape[0] if rows is None else rows.numel()
    if count == 0:
        fakes = _outputs(hidden, weight, labels, jacobian=jacobian, scratch_bytes=scratch_bytes)
        return tuple(output.zero_() for output in fakes)  # type: ignore[return-value]
    if labels is not None:
        labels = _take(labels, rows)

    found_jacobian = hidden.new_empty(0, dtype=jacobian_dtype(hidden.dtype))
    cache = _cache(hidden, weight, scratch_bytes)
    if jacobian:
        found, found_jacobian = statistics_and_jacobian(
            _take(hidden, rows), weight, bias, labels, transform
        )
    elif uses_triton(hidden) and not scratch_bytes:
        from fastpref.kernels.logsumexp import projection_logsumexp

        found = Statistics(*projection_logsumexp(hidden, weight, bias, labels, rows, transform))
    else:
        found = statistics(_take(hidden, rows), weight, bias, labels, transform, cache=cache)

    if labels is None:
        return found.lse_other.new_empty(0), found.lse_other, found_jacobian, cache
    logps, lse = found.logps(), found.lse()
    if not compact:
        ignored = labels == ignore_index
        logps, lse = logps.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)
        if jacobian:
            found_jacobian.masked_fill_(ignored.unsqueeze(1), 0)
    if jacobian:
        found_jacobian = _spread(found_jacobian, rows, hidden.shape[0])
    logps, lse = (_spread(values, rows, hidden.shape[0]) for values in (logps, lse))
    return logps, lse, found_jacobian, cache


@linear_logps_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compact: bool,
    jacobian: bool,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(hidden, weight, labels, jacobian=jacobian, scratch_bytes=scratch_bytes)


@torch.library.custom_op("fastpref::linear_logps_backward", mutates_args=())
def linear_logps_backward_op(
    logps_gradient: Tensor | None,  # (N,)
    lse_gradient: Tensor | None,  # (N,)
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (N,) int64
    logps: Tensor,  # (N,), empty without labels
    lse: Tensor,  # (N,)
    cache: Tensor,  # flat
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compact: bool,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not wanted."""
    hidden_gradient, weight_gradient, bias_gradient = _gradients(
        hidden, weight, wants_hidden, wants_weight, wants_bias
    )
    rows = _rows(labels, weight, ignore_index, compact)
    count = hidden.shape[0] if rows is None else rows.numel()
    if count == 0:
        return hidden_gradient.zero_(), weight_gradient.zero_(), bias_gradient.zero_()

    lse = _take(lse, rows)
    from_lse = _incoming(lse_gradient, rows, lse)
    probability_coefficients, label_coefficients = from_lse, torch.zeros_like(from_lse)
    if labels is not None:
        labels, logps = _take(labels, rows), _take(logps, rows)
        from_logps = _incoming(logps_gradient, rows, lse)
        if not compact:
            from_lse, from_logps = (
                one.masked_fill(labels == ignore_index, 0) for one in (from_lse, from_logps)
            )
        probability_coefficients = from_lse - from_logps
        label_coefficients = from_lse * logps.exp() - from_logps * torch.expm1(logps)
        if not compact:
            # Their coefficients are 0, which an exponential that overflows would make NaN. With
            # these every exponential is 0, and the label's logit, the sum of both, is finite.
            largest = torch.finfo(lse.dtype).max
            lse = lse.masked_fill(labels == ignore_index, largest)
            logps = logps.masked_fill(labels == ignore_index, -largest)
    total = lse.new_empty(count, hidden.shape[1] if wants_hidden else 0)
    gradients(
        _take(hidden, rows),
        weight,
        bias,
        labels,
        LogitTransform(temperature, logit_scale, softcap),
        logps,
        lse,
        probability_coefficients,
        label_coefficients,
        cache=cache,
        hidden_gradient=total if wants_hidden else None,
        weight_gradient=weight_gradient if wants_weight else None,
        bias_gradient=bias_gradient if wants_bias else None,
    )
    if wants_hidden:
        hidden_gradient = _spread(total.to(hidden.dtype), rows, hidden.shape[0])
    return hidden_gradient, weight_gradient, bias_gradient


@linear_logps_backward_op.register_fake
def _(
    logps_gradient: Tensor | None,
    lse_gradient: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    logps: Tensor,
    lse: Tensor,
    cache: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compact: bool,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(hidden, weight, wants_hidden, wants_weight, wants_bias)


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
    hidden, weight, bias, labels, *ctx.transform, ctx.ignore_index, ctx.compact, _, _ = inputs
    logps, lse, jacobian, cache = output
    ctx.mark_non_differentiable(jacobian, cache)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, logps, lse, jacobian, cache)


def _backward(
    ctx: Any, logps_gradient: Tensor | None, lse_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, logps, lse, jacobian, cache = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    nothing = (None,) * 8
    # The Jacobian is that of the log-probabilities, or without labels of the logsumexp.
    own, other = logps_gradient, lse_gradient
    if labels is None:
        own, other = other, own
    if jacobian.numel() and own is not None and other is None:
        return scaled_jacobian_op(own, jacobian, hidden.dtype), None, None, *nothing
    found = linear_logps_backward_op(
        logps_gradient, lse_gradient, hidden, weight, bias, labels, logps, lse, cache,
        *ctx.transform, ctx.ignore_index, ctx.compact, *wanted,
    )  # fmt: skip
    return *(one if want else None for one, want in zip(found, wanted, strict=True)), *nothing


linear_logps_op.register_autograd(_backward, setup_context=_setup_context)


def _outputs(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, *, jacobian: bool, scratch_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (count, width), dtype = hidden.shape, statistics_dtype(hidden.dtype)
    return (
        hidden.new_empty(count if labels is not None else 0, dtype=dtype),
        hidden.new_empty(count, dtype=dtype),
        hidden.new_empty((count, width) if jacobian else (0,), dtype=jacobian_dtype(hidden.dtype)),
        _cache(hidden, weight, scratch_bytes),
    )


def _cache(hidden: Tensor, weight: Tensor, scratch_bytes: int) -> Tensor:
    if not scratch_bytes or not hidden.shape[0]:
        return hidden.new_empty(0, dtype=torch.uint8)
    dtype = statistics_dtype(hidden.dtype)
    grid = tile_grid(hidden.shape[0], weight.shape[0], hidden.device, dtype)
    everything = TileCache(hidden, grid, operand_dtype(hidden), dtype).bytes_of_all()
    return hidden.new_empty(min(scratch_bytes, everything), dtype=torch.uint8)


def _gradients(
    hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(weight.shape[:1] if wants_bias else (0,)),
    )


def _rows(labels: Tensor | None, weight: Tensor, ignore_index: int, compact: bool) -> Tensor | None:
    if labels is None or not compact:
        return None
    return labelled_rows(labels, weight.shape[0], ignore_index)


def _take(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _incoming(gradient: Tensor | None, rows: Tensor | None, like: Tensor) -> Tensor:
    """The gradient (n,) of some rows' numbers: zeros where none came, contiguous for kernels."""
    return torch.zeros_like(like) if gradient is None else _take(gradient, rows).contiguous()


def _spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Put ``values`` of some rows back in their places among ``count`` rows, zeros elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)
