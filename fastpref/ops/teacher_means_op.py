"""The custom operator under `teacher_means`: one product with each head, without gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import statistics_dtype
from fastpref.ops.divergence_rows import product
from fastpref.ops.operands import SCHEMA, Logits, Operands, register, spread, take
from fastpref.ops.softmax_rows import softmax_blocks
from fastpref.ops.torch_tiles import LogitTransform


class Found(NamedTuple):
    """What the operator returns, in the wider dtype of statistics of the two models."""

    weight: Tensor  # (N, H_s), means of the student's weight
    bias: Tensor  # (N,), of its bias; 0 where it has none
    entropy: Tensor  # (N,), of the teacher


def means_of_operands(*arguments: Any) -> tuple[Tensor, ...]:
    """Means over the teacher's distributions: `Found`."""
    operands, (weight, bias) = Operands.split(arguments)
    rows, count, found = operands.rows(), operands.hidden.shape[0], Found(*_outputs(*arguments))
    n_rows = operands.count(rows)
    if n_rows == 0:
        return tuple(one.zero_() for one in found)
    operands, ignored = operands.without_ignored()
    dtype = found.weight.dtype
    # Products take operands of the dtype of the hidden states, and the student here has none.
    narrow = dtype if dtype == torch.float64 else weight.dtype
    nothing = weight.new_empty(0, weight.shape[1], dtype=narrow)
    student = Logits(nothing, None, weight, bias, None, LogitTransform())
    if n_rows < count:
        found = Found(*(one.new_empty(n_rows, *one.shape[1:]) for one in found))
    _read(operands.logits(rows), student, found)
    if ignored is not None:
        found.weight.masked_fill_(ignored.unsqueeze(1), 0)
        for one in found[1:]:
            one.masked_fill_(ignored, 0)
    return tuple(spread(one, rows, count) for one in found)


def _read(teacher: Logits, student: Logits, found: Found) -> None:
    """Write the numbers of every row."""
    dtype = found.weight.dtype
    for block in softmax_blocks(teacher, dtype):
        rows, p = block.rows, block.probabilities
        # The largest probability stays out of the product, whose operands may be rounded.
        of_top, top = p.gather(1, block.top), block.top.squeeze(1)
        p.scatter_(1, block.top, 0)
        product(p, student, found.weight[rows])
        found.weight[rows].addcmul_(take(student.weight, top).to(dtype), of_top)
        found.entropy[rows] = block.entropy
        found.bias[rows] = 0
        if student.bias is not None:
            bias = student.bias.to(dtype)
            found.bias[rows] = _mean(p, bias).addcmul_(take(bias, top), of_top.squeeze(1))


def _mean(p: Tensor, bias: Tensor) -> Tensor:
    """``p @ bias`` (n,) in which tokens that the student masks count where they have a share."""
    masked = bias == -torch.inf
    columns = torch.stack((bias.masked_fill(masked, 0), masked.to(bias.dtype)), dim=1)
    mean, of_masked = (p @ columns).unbind(1)
    return mean.masked_fill(of_masked > 0, -torch.inf)


def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    operands, (weight, _) = Operands.split(arguments)
    count, hidden = operands.hidden.shape[0], operands.hidden
    dtype = torch.promote_types(*(statistics_dtype(one.dtype) for one in (hidden, weight)))
    return Found(
        hidden.new_empty(count, weight.shape[1], dtype=dtype),
        hidden.new_empty(count, dtype=dtype),
        hidden.new_empty(count, dtype=dtype),
    )


teacher_means_ops = register(
    "teacher_means",
    means_of_operands,
    _outputs,
    f"({SCHEMA}, Tensor student_weight, Tensor? student_bias) -> (Tensor, Tensor, Tensor)",
)
