"""The custom operator under `linear_token_preference`: what two heads find likeliest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import statistics_dtype
from fastpref.ops.divergence_rows import project
from fastpref.ops.operands import SCHEMA, Logits, Operands, register, spread
from fastpref.ops.tiling import blocks, carve, padded, rows_per_block
from fastpref.ops.torch_tiles import LogitTransform, largest


class Found(NamedTuple):
    """What the operator returns, 0 in rows that are not read."""

    tokens: Tensor  # (N, 2) int64, the teacher's likeliest and the student's
    margin: Tensor  # (N,), the teacher's logit of the first less that of the second; NaN where one
    # of the two has no distribution


def likeliest_of_both(*arguments: Any) -> tuple[Tensor, ...]:
    """The likeliest token of each head, and how far apart the teacher sees them: `Found`."""
    operands, (hidden, weight, bias, *transform) = Operands.split(arguments)
    rows, count = operands.rows(), operands.hidden.shape[0]
    operands, _ = operands.without_ignored()
    student = operands.logits(rows)
    teacher = Logits(hidden, rows, weight, bias, None, LogitTransform(*transform))
    n_rows, vocab_size = student.shape()
    like = operands.hidden.new_empty(0, dtype=statistics_dtype(operands.hidden.dtype))
    tokens, margin = like.new_empty(n_rows, 2, dtype=torch.int64), like.new_empty(n_rows)
    step = rows_per_block(n_rows, vocab_size, like, tiles=1)
    buffer = like.new_empty(step * padded(vocab_size))
    for block in blocks(0, n_rows, step):
        tile = carve(buffer, block.stop - block.start, vocab_size)
        of_student, tokens[block, 1] = _likeliest(student, block, tile)
        maximum, tokens[block, 0] = _likeliest(teacher, block, tile)
        of_students = tile.gather(1, tokens[block, 1:]).squeeze(1)
        torch.sub(maximum, of_students, out=margin[block])
        margin[block] += (maximum + of_student) * 0
    return tuple(spread(one, rows, count) for one in (tokens, margin))


def _likeliest(logits: Logits, rows: slice, tile: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit (k,) of some rows and its token (k,); all logits go to ``tile``."""
    project(logits, rows, tile)
    return largest(logits.transform.apply_(tile))


def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    hidden = Operands.split(arguments)[0].hidden
    count, dtype = hidden.shape[0], statistics_dtype(hidden.dtype)
    return Found(
        hidden.new_empty(count, 2, dtype=torch.int64), hidden.new_empty(count, dtype=dtype)
    )


token_preference_ops = register(
    "likeliest_tokens",
    likeliest_of_both,
    _outputs,
    f"({SCHEMA}, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
    "float teacher_temperature, float teacher_logit_scale, float? teacher_softcap) "
    "-> (Tensor, Tensor)",
)
