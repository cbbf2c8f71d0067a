"""The custom operators under `linear_logps` and `linear_logsumexp`: schema, fakes and autograd.

Below autograd nobody can see ``requires_grad``, so the callers say with ``jacobian`` whether the
hidden states alone need a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.derivatives import first_derivative_only
from fastpref.ops.backend import operand_dtype, statistics_dtype
from fastpref.ops.backward import LogitGradients, gradients
from fastpref.ops.forward import read, read_with_jacobian
from fastpref.ops.operands import SCHEMA, Operands, register, spread, take
from fastpref.ops.running import Running
from fastpref.ops.tiling import bytes_of_all_tiles


class Found(NamedTuple):
    """What the operator returns; what is not wanted is empty or has no columns.

    The stats are entropy, the largest logit and the label's, 0 in rows that are ignored.
    All below the stats is for the backward pass, and held by nobody else: whoever writes into the
    log-probabilities spoils no gradient.
    """

    logps: Tensor  # (N,), with labels
    lse: Tensor  # (N,)
    jacobian: Tensor  # (N, H), with ``jacobian``; of the first n, if n rows are read
    stats: Tensor  # (N, 3), with ``stats``
    running: Tensor  # (3, N), the fields of `Running`; likewise
    rows: Tensor  # (N,) int64, which rows these are, if labels are chosen
    n_rows: Tensor  # (1,) int64 on the host: n, if labels are chosen
    cache: Tensor  # uint8, with ``scratch_bytes``


def logps_and_more(*arguments: Any) -> tuple[Tensor, ...]:
    """Log-probabilities, logsumexp and what else is wanted: `Found`."""
    operands, (wants_jacobian, wants_stats, scratch_bytes) = Operands.split(arguments)
    found, count = Found(*empty_found(*arguments)), operands.hidden.shape[0]
    rows = operands.rows()
    n_rows = operands.count(rows)
    operands.note_rows(rows, found.rows, found.n_rows)
    if n_rows == 0:
        return tuple(one if one is found.n_rows else one.zero_() for one in found)

    operands, ignored = operands.without_ignored()
    if wants_jacobian:
        found.jacobian[n_rows:] = 0
        running, stats = read_with_jacobian(
            operands.logits(rows), found.jacobian[:n_rows], stats=wants_stats
        )
    else:
        running, stats = read(operands, rows, found.cache, stats=wants_stats)

    found.running[:, n_rows:] = 0
    found.running[:, :n_rows] = running
    state = Running.of(running)
    lse, logps = state.lse(), found.logps
    if operands.labels is not None:
        logps = state.logps()
    if ignored is not None:
        logps, lse = logps.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)
        found.running.masked_fill_(ignored, 0)
        stats = stats.masked_fill(ignored.unsqueeze(1), 0)
        if wants_jacobian:
            found.jacobian.masked_fill_(ignored.unsqueeze(1), 0)
    logps, lse, stats = (spread(one, rows, count) for one in (logps, lse, stats))
    return tuple(found._replace(logps=logps, lse=lse, stats=stats))


def empty_found(*arguments: Any) -> tuple[Tensor, ...]:
    """Places for `Found`."""
    operands, (wants_jacobian, wants_stats, scratch_bytes) = Operands.split(arguments)
    hidden = operands.hidden
    (count, width), dtype = hidden.shape, statistics_dtype(hidden.dtype)
    chosen = operands.compacts()
    return Found(
        hidden.new_empty(0 if operands.labels is None else count, dtype=dtype),
        hidden.new_empty(count, dtype=dtype),
        # Wide, so that a gradient is rounded once, after the product with the incoming one: in
        # float16 only the loss scale that comes with that one lifts 1 - p of a certain token.
        hidden.new_empty(count, width if wants_jacobian else 0, dtype=dtype),
        hidden.new_empty(count, 3 if wants_stats else 0, dtype=dtype),
        hidden.new_empty(3, count, dtype=dtype),
        hidden.new_empty(count if chosen else 0, dtype=torch.int64),
        hidden.new_empty(int(chosen), dtype=torch.int64, device="cpu" if chosen else hidden.device),
        hidden.new_empty(_cache_bytes(operands, scratch_bytes), dtype=torch.uint8),
    )


def _cache_bytes(operands: Operands, scratch_bytes: int) -> int:
    if not scratch_bytes:
        return 0
    hidden, dtype = operands.hidden, statistics_dtype(operands.hidden.dtype)
    sizes = (hidden.shape[0], operands.weight.shape[0])
    everything = bytes_of_all_tiles(*sizes, operand_dtype(hidden), dtype)
    # Not min, which would compile anew for a length on the other side.
    size: int = torch.sym_min(scratch_bytes, everything)  # type: ignore[no-untyped-call]  # its own
    return size


linear_logps_ops = register(
    "linear_logps",
    logps_and_more,
    empty_found,
    f"({SCHEMA}, bool jacobian, bool stats, int scratch_bytes)"
    f" -> ({', '.join(['Tensor'] * len(Found._fields))})",
)


def gradients_of_operands(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not wanted."""
    operands, more = Operands.split(arguments)
    from_logps, from_lse, running, rows, n_rows, cache, wants_hidden, *wants_head = more
    rows = rows_read(operands, rows, n_rows)
    if operands.count(rows) == 0:
        return tuple(gradient.zero_() for gradient in empty_gradients(*arguments))

    operands, ignored = operands.without_ignored()
    state = Running.of(running[:, : operands.count(rows)])
    shares, slope = state.shares(), operands.transform().slope(state.target_logit)
    from_lse = incoming(from_lse, rows, slope)
    from_logps = incoming(None if operands.labels is None else from_logps, rows, slope)
    coefficients = (from_lse - from_logps) * shares.unit * operands.transform().factor
    of_labels = (from_lse * shares.label + from_logps * shares.others) * slope
    reference = state.reference
    if ignored is not None:
        coefficients, of_labels = (one.masked_fill(ignored, 0) for one in (coefficients, of_labels))
        # The bias alone may make a logit whose exponential overflows: 0 times infinity.
        reference = reference.masked_fill(ignored, torch.finfo(reference.dtype).max)
    # The hidden states' gradient has no room among all rows before that of those read is known.
    hidden_gradient, weight_gradient, bias_gradient = empty_gradients(
        *arguments[:-3], False, *wants_head
    )
    width = operands.hidden.shape[1]
    total = slope.new_empty(len(slope), width) if wants_hidden else None
    gradients(
        operands.logits(rows),
        LogitGradients(reference, coefficients, of_labels),
        cache=cache,
        hidden_gradient=total,
        weight_gradient=weight_gradient if wants_head[0] else None,
        bias_gradient=bias_gradient if wants_head[1] else None,
    )
    if total is not None:
        hidden_gradient = spread(total.to(operands.hidden.dtype), rows, operands.hidden.shape[0])
    return hidden_gradient, weight_gradient, bias_gradient


def empty_gradients(hidden: Tensor, weight: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Places for the gradients that the last three arguments ask for."""
    *_, wants_hidden, wants_weight, wants_bias = more
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(weight.shape[:1] if wants_bias else (0,)),
    )


LEFT_FOR_BACKWARD = (
    "Tensor? logps_gradient, Tensor? lse_gradient, Tensor running, Tensor rows, Tensor n_rows"
)
linear_logps_backward_ops = register(
    "linear_logps_backward",
    gradients_of_operands,
    empty_gradients,
    f"({SCHEMA}, {LEFT_FOR_BACKWARD}, Tensor cache, "
    "bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)",
)


def gradient_by_jacobian(*arguments: Any) -> Tensor:
    """Gradient of hidden (N, H) from the Jacobian (n, H) of the log-probabilities.

    Without labels the Jacobian is that of the logsumexp, which else is the label's logit less its
    log-probability.

    An operator without a derivative of its own: the Jacobian depends on the hidden states, so what
    autograd would make of a second derivative here is wrong, and it says so instead.
    """
    operands, (from_logps, from_lse, running, rows, n_rows, jacobian) = Operands.split(arguments)
    rows = rows_read(operands, rows, n_rows)
    n_rows, count = operands.count(rows), operands.hidden.shape[0]
    jacobian, target_logit = jacobian[:n_rows], running[2, :n_rows]
    gradient = torch.empty_like(jacobian, dtype=operands.hidden.dtype)
    if operands.labels is None or from_lse is None:
        given = from_lse if operands.labels is None else from_logps
        coefficients = incoming(given, rows, target_logit)
        torch.mul(coefficients.unsqueeze(1), jacobian, out=gradient)
        return spread(gradient, rows, count)
    operands, ignored = operands.without_ignored()
    from_lse, from_logps = (incoming(one, rows, target_logit) for one in (from_lse, from_logps))
    of_labels = from_lse * operands.transform().slope(target_logit)
    if ignored is not None:
        of_labels = of_labels.masked_fill(ignored, 0)
    total = jacobian * (from_logps - from_lse).unsqueeze(1)
    total.addcmul_(operands.logits(rows).weight_of_labels(), of_labels.unsqueeze(1))
    return spread(gradient.copy_(total), rows, count)


def empty_hidden_gradient(hidden: Tensor, *_: Any) -> Tensor:
    """A place for the gradient of the hidden states."""
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


gradient_by_jacobian_ops = register(
    "linear_logps_gradient_by_jacobian",
    gradient_by_jacobian,
    empty_hidden_gradient,
    f"({SCHEMA}, {LEFT_FOR_BACKWARD}, Tensor jacobian) -> Tensor",
)


def rows_read(operands: Operands, rows: Tensor, n_rows: Tensor) -> Tensor | None:
    """The rows (n,) that the forward pass read, without a wait for the device; None for all."""
    if not operands.compacts():
        return None
    number = int(n_rows)
    return None if number == len(rows) else rows[:number]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, _ = Operands.split(inputs)
    found = Found(*output)
    ctx.mark_non_differentiable(*found[2:])
    ctx.set_materialize_grads(False)
    ctx.options = operands[4:]
    ctx.save_for_backward(
        *operands[:4], found.running, found.rows, found.n_rows, found.cache, found.jacobian
    )


@first_derivative_only("fastpref.linear_logps, linear_logsumexp")
def _backward(
    ctx: Any, from_logps: Tensor | None, from_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if from_logps is None and from_lse is None:
        return (None,) * len(ctx.needs_input_grad)
    hidden, weight, bias, labels, running, rows, n_rows, cache, jacobian = ctx.saved_tensors
    operands = Operands(hidden, weight, bias, labels, *ctx.options)
    left = (from_logps, from_lse, running, rows, n_rows)
    wanted = ctx.needs_input_grad[:3]
    nothing = (None,) * (len(ctx.needs_input_grad) - 3)
    if jacobian.numel():
        op = gradient_by_jacobian_ops.of(operands)
        return op(*operands, *left, jacobian), None, None, *nothing
    found = linear_logps_backward_ops.of(operands)(*operands, *left, cache, *wanted)
    return *(one if want else None for one, want in zip(found, wanted, strict=True)), *nothing


for op in linear_logps_ops:
    op.register_autograd(_backward, setup_context=_setup_context)


def incoming(gradient: Tensor | None, rows: Tensor | None, like: Tensor) -> Tensor:
    """The gradient (n,) of some rows' numbers: zeros where none came, contiguous for kernels."""
    return torch.zeros_like(like) if gradient is None else take(gradient, rows).contiguous()
