"""The custom operator under `teacher_means`: one product with each head, without gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import statistics_dtype
from fastpref.ops.divergence_rows import normalise_, product, project
from fastpref.ops.divergences import times
from fastpref.ops.operands import SCHEMA, Logits, Operands, register, spread, take
from fastpref.ops.tiling import blocks, carve, padded, rows_per_block, rows_per_piece
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
    """Write the numbers of every row, of which the teacher projects some at a time."""
    (count, vocab_size), like = teacher.shape(), found.entropy
    step = rows_per_block(count, vocab_size, like)
    piece = min(step, rows_per_piece(vocab_size, like))
    tile = like.new_empty(step * padded(vocab_size))
    spare = like.new_empty(piece * padded(vocab_size))
    of_top = like.new_empty(step)
    top = torch.empty(step, dtype=torch.int64, device=like.device)
    for rows in blocks(0, count, step):
        size = rows.stop - rows.start
        p = carve(tile, size, vocab_size)
        project(teacher, rows, p)
        for some in blocks(0, size, piece):
            logits = teacher.transform.apply_(p[some])
            out = carve(spare, len(logits), vocab_size)
            _, column, others = normalise_(logits, out=out)
            found.entropy[rows][some] = others.log1p() - times(out, logits, out=logits).sum(1)
            # The largest probability stays out of the product: its operands may be rounded.
            p[some] = out.scatter_(1, column, 0)
            of_top[some], top[some] = 1 / (1 + others), column.squeeze(1)
        product(p, student, found.weight[rows])
        share = of_top[:size]
        means, weight = found.weight[rows], take(student.weight, top[:size])
        means.addcmul_(weight.to(like.dtype), share.unsqueeze(1))
        if student.bias is None:
            found.bias[rows] = 0
        else:
            bias = student.bias.to(like.dtype)
            found.bias[rows] = (p @ bias).addcmul_(take(bias, top[:size]), share)


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
