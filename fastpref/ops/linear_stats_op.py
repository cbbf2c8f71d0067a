"""The custom operator under `linear_stats`: one reading of the vocabulary, without gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.ops.backend import uses_triton
from fastpref.ops.forward import project
from fastpref.ops.linear_logps_op import _rows, _spread, _take
from fastpref.ops.matmul import operand_dtype, statistics_dtype
from fastpref.ops.partial import Partial, Sums, merge, partial_of_tile
from fastpref.ops.tiles import label_columns
from fastpref.ops.tiling import tile_grid
from fastpref.ops.transform import LogitTransform


@torch.library.custom_op("fastpref::linear_stats", mutates_args=())
def linear_stats_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (N,) int64
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compact: bool,
    second: bool,
    shortfall: bool,
    squares: bool,
) -> tuple[Tensor, Tensor]:
    """The numbers (N, 5) of a `Partial` of the whole vocabulary, and the labels' logits (N,).

    Without ``labels`` there are no labels' logits: (0,). Rows that ``compact`` leaves out are 0.
    """
    transform, sums = (
        LogitTransform(temperature, logit_scale, softcap),
        Sums(second, shortfall, squares),
    )
    rows = _rows(labels, weight, ignore_index, compact)
    count = hidden.shape[0] if rows is None else rows.numel()
    if count == 0:
        numbers, target_logit = _outputs(hidden, labels)
        return numbers.zero_(), target_logit.zero_()
    if labels is not None:
        labels = _take(labels, rows)
    if uses_triton(hidden):
        from fastpref.kernels.statistics import projection_partials

        parts, target_logit = projection_partials(
            hidden, weight, bias, labels, rows, transform, sums
        )
        found = merge(Partial(*parts))
    else:
        found, target_logit = _statistics(
            _take(hidden, rows), weight, bias, labels, transform, sums
        )
    if labels is not None:
        target_logit = _spread(target_logit, rows, hidden.shape[0])
    return _spread(torch.stack(found, dim=1), rows, hidden.shape[0]), target_logit


@linear_stats_op.register_fake
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
    second: bool,
    shortfall: bool,
    squares: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(hidden, labels)


def _statistics(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    transform: LogitTransform,
    sums: Sums,
) -> tuple[Partial, Tensor]:
    """Numbers (n,) of the whole vocabulary, tile by tile, and the labels' logits (n,) or (0,)."""
    dtype = statistics_dtype(hidden.dtype)
    grid = tile_grid(hidden.shape[0], weight.shape[0], hidden.device, dtype)
    scratch = grid.buffer(hidden.device, dtype)
    numbers = scratch.new_empty(len(Partial._fields), hidden.shape[0])
    target_logit = scratch.new_full((0 if labels is None else hidden.shape[0],), math.nan)
    hidden = hidden.to(operand_dtype(hidden))
    for rows in grid.row_blocks():
        running = numbers[:, rows]
        for columns in grid.column_blocks():
            logits = transform.apply_(project(hidden[rows], weight, bias, columns, scratch))
            if labels is not None:
                column, inside = label_columns(labels[rows], columns.start, logits.shape[1])
                at_label = logits.gather(1, column).squeeze(1)
                target_logit[rows] = torch.where(inside, at_label, target_logit[rows])
            found = torch.stack(partial_of_tile(logits, sums))
            if columns.start > 0:
                found = torch.stack(merge(Partial(*torch.stack((running, found), dim=1))))
            running.copy_(found)
    return Partial(*numbers), target_logit


def _outputs(hidden: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(hidden.dtype)
    count = hidden.shape[0]
    return (
        hidden.new_empty((count, len(Partial._fields)), dtype=dtype),
        hidden.new_empty(0 if labels is None else count, dtype=dtype),
    )
