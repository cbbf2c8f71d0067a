"""The custom operators under `linear_cached_kl`: that under `linear_logps`, and a teacher's means.

The gradient is the student's mean of the head's weight less the teacher's. An operator of its own
rounds the difference, and not the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.derivatives import first_derivative_only
from fastpref.ops.linear_logps_op import (
    LEFT_FOR_BACKWARD,
    Found,
    empty_found,
    empty_hidden_gradient,
    incoming,
    logps_and_more,
    rows_read,
)
from fastpref.ops.operands import SCHEMA, Operands, register, spread, take
from fastpref.ops.tiling import blocks, rows_per_gather


def divergence_and_more(*arguments: Any) -> tuple[Tensor, ...]:
    """Divergences (N,) from the teacher whose means these are, and the student's `Found`."""
    operands, (means, of_bias, entropy, wants_jacobian, wants_stats) = Operands.split(arguments)
    student = Found(*logps_and_more(*operands, wants_jacobian, wants_stats, 0))
    divergence, factor = student.lse - entropy.to(student.lse.dtype), operands.transform().factor
    for rows in blocks(0, len(divergence), rows_per_gather(means.shape[1], divergence)):
        hidden = operands.hidden[rows].to(divergence.dtype)
        divergence[rows] -= factor * (hidden * means[rows]).sum(1)
    if of_bias is not None:
        divergence -= factor * of_bias
    return divergence.masked_fill_(operands.labels == operands.ignore_index, 0), *student


def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    operands, (*_, wants_jacobian, wants_stats) = Operands.split(arguments)
    student = Found(*empty_found(*operands, wants_jacobian, wants_stats, 0))
    return torch.empty_like(student.lse), *student


MEANS_SCHEMA = "Tensor means, Tensor? mean_bias, Tensor teacher_entropy"
cached_kl_ops = register(
    "linear_cached_kl",
    divergence_and_more,
    _outputs,
    f"({SCHEMA}, {MEANS_SCHEMA}, bool jacobian, bool stats)"
    f" -> ({', '.join(['Tensor'] * (1 + len(Found._fields)))})",
)


def gradient_by_jacobian(*arguments: Any) -> Tensor:
    """Gradient of hidden (N, H) from the Jacobian (n, H) of the log-probabilities.

    The divergence has the gradient of the logsumexp, less the means. As under `linear_logps` an
    operator without a derivative of its own.
    """
    operands, more = Operands.split(arguments)
    means, from_divergence, from_logps, from_lse, running, rows, n_rows, jacobian = more
    rows = rows_read(operands, rows, n_rows)
    count, target_logit = operands.count(rows), running[2, : operands.count(rows)]
    given = from_divergence, from_logps, from_lse
    of_means, logps, lse = (incoming(one, rows, target_logit) for one in given)
    lse, means = lse + of_means, take(means, rows)
    operands, ignored = operands.without_ignored()
    of_labels, of_means = (operands.transform().factor * one for one in (lse, -of_means))
    if ignored is not None:
        of_labels, means = (
            of_labels.masked_fill(ignored, 0),
            means.masked_fill(ignored.unsqueeze(1), 0),
        )
    total = jacobian[:count] * (logps - lse).unsqueeze(1)
    total.addcmul_(operands.logits(rows).weight_of_labels(), of_labels.unsqueeze(1))
    total.addcmul_(means, of_means.unsqueeze(1))
    return spread(total.to(operands.hidden.dtype), rows, operands.hidden.shape[0])


cached_kl_backward_ops = register(
    "linear_cached_kl_backward",
    gradient_by_jacobian,
    empty_hidden_gradient,
    f"({SCHEMA}, Tensor means, Tensor? divergence_gradient, {LEFT_FOR_BACKWARD}, Tensor jacobian)"
    " -> Tensor",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, (means, *_) = Operands.split(inputs)
    student = Found(*output[1:])
    ctx.mark_non_differentiable(*student[2:])
    ctx.set_materialize_grads(False)
    ctx.options = operands[4:]
    ctx.save_for_backward(
        *operands[:4], means, student.running, student.rows, student.n_rows, student.jacobian
    )


@first_derivative_only("fastpref.linear_cached_kl")
def _backward(
    ctx: Any,
    from_divergence: Tensor | None,
    from_logps: Tensor | None,
    from_lse: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    given = from_divergence, from_logps, from_lse
    nothing = (None,) * (len(ctx.needs_input_grad) - 1)
    if all(one is None for one in given):
        return None, *nothing
    hidden, weight, bias, labels, means, *left, jacobian = ctx.saved_tensors
    operands = Operands(hidden, weight, bias, labels, *ctx.options)
    op = cached_kl_backward_ops.of(operands)
    return op(*operands, means, *given, *left, jacobian), *nothing


for op in cached_kl_ops:
    op.register_autograd(_backward, setup_context=_setup_context)
