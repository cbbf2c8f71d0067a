"""One reading of the vocabulary: log-probabilities and logsumexp values, and their Jacobian."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.ops.backend import tile_functions
from fastpref.ops.cache import TileCache
from fastpref.ops.matmul import jacobian_dtype, multiply, operand_dtype, statistics_dtype
from fastpref.ops.tiling import Tiling, carve, tile_grid
from fastpref.ops.transform import LogitTransform


class Statistics(NamedTuple):
    """What the vocabulary says about some rows.

    Keeping the label out of the sum makes ``logps`` and ``1 - p(label)`` exact to their last digits
    also where the model is certain.
    """

    target_logit: Tensor  # (n,) the label's logit; NaN for a label outside the vocabulary
    lse_other: Tensor  # (n,) logsumexp of every other logit

    def logps(self) -> Tensor:
        """Log-probabilities (n,) of the labels."""
        return logsigmoid(self.target_logit - self.lse_other)

    def lse(self) -> Tensor:
        """Logsumexp (n,) of all logits."""
        return torch.logaddexp(self.target_logit, self.lse_other)


def statistics(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    transform: LogitTransform,
    *,
    cache: Tensor,  # uint8, flat, written: as many tiles of exponentials as it holds
) -> Statistics:
    """Fold the vocabulary into the statistics of every row: one matrix product."""
    grid, scratch, running = _start(hidden, weight)
    fold_tile = tile_functions(hidden).fold_tile
    hidden = hidden.to(operand_dtype(hidden))
    tiles = TileCache(cache, grid, hidden.dtype, scratch.dtype)
    for rows in grid.row_blocks():
        maximum, sum_exp, target_logit = (state[rows] for state in running)
        rescale = torch.empty_like(maximum)
        for columns in grid.column_blocks():
            kept = tiles.tile(rows, columns)
            # A product in the dtype of the cache goes straight into it, to be folded in place.
            in_place = kept is not None and kept.exponentials.dtype == scratch.dtype
            buffer = kept.exponentials.view(-1) if kept is not None and in_place else scratch
            tile = project(hidden[rows], weight, bias, columns, buffer)
            fold_tile(
                tile, _at(labels, rows), columns.start, transform,
                maximum, sum_exp, target_logit,
                *((None, None) if kept is None else (kept.exponentials, rescale)),
            )  # fmt: skip
            if kept is not None:
                kept.maximum.copy_(maximum)
    return _finish(*running)


def statistics_and_jacobian(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    transform: LogitTransform,
) -> tuple[Statistics, Tensor]:
    """The statistics, and (n, H) ``d logps / d hidden`` (without labels ``d lse / d hidden``).

    Two matrix products. As in flash attention, each tile of exponentials meets its stretch of the
    weight while it is in cache, relative to a running maximum that later tiles may raise.
    """
    grid, scratch, running = _start(hidden, weight)
    fold_tile = tile_functions(hidden).fold_tile
    jacobian = torch.empty_like(
        hidden, dtype=jacobian_dtype(hidden.dtype), memory_format=torch.contiguous_format
    )
    hidden = hidden.to(operand_dtype(hidden))
    operands = grid.operand_buffer(scratch, hidden.dtype)
    for rows in grid.row_blocks():
        maximum, sum_exp, target_logit = (state[rows] for state in running)
        rescale = torch.empty_like(maximum)
        total = hidden.new_empty(hidden[rows].shape, dtype=scratch.dtype)
        for columns in grid.column_blocks():
            tile = project(hidden[rows], weight, bias, columns, scratch)
            exponentials = carve(operands, *tile.shape)
            fold_tile(
                tile, _at(labels, rows), columns.start, transform,
                maximum, sum_exp, target_logit, exponentials, rescale,
            )  # fmt: skip
            if columns.start > 0:
                total.mul_(rescale.unsqueeze(1))
            multiply(exponentials, weight[columns], total, add=columns.start > 0)
        # The sum is 0 only where every other logit is -inf, and then so is the total.
        total.div_(sum_exp.clamp_min(torch.finfo(sum_exp.dtype).tiny).unsqueeze(1))
        if labels is not None:
            others = _finish(maximum, sum_exp, target_logit).lse_other
            label_rows = weight.index_select(0, labels[rows].clamp(0, weight.shape[0] - 1))
            slope = transform.slope(target_logit)
            slope = slope.unsqueeze(1) if isinstance(slope, Tensor) else slope
            # Wide before the slope, which in a narrow dtype would round, and overflow float16.
            torch.sub(label_rows.to(total.dtype).mul_(slope), total, out=total)
            total.mul_(torch.sigmoid(others - target_logit).unsqueeze(1))
        jacobian[rows] = total
    return _finish(*running), jacobian


def project(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    columns: slice,
    scratch: Tensor,  # flat, overwritten
) -> Tensor:  # (n, w), a view of scratch
    """``hidden @ weight[columns].T + bias[columns]``."""
    tile = carve(scratch, hidden.shape[0], columns.stop - columns.start)
    multiply(hidden, weight[columns].T, tile)
    return tile if bias is None else tile.add_(bias[columns])


def _start(hidden: Tensor, weight: Tensor) -> tuple[Tiling, Tensor, tuple[Tensor, Tensor, Tensor]]:
    dtype = statistics_dtype(hidden.dtype)
    grid = tile_grid(hidden.shape[0], weight.shape[0], hidden.device, dtype)
    # A finite start: -inf minus -inf would be NaN where a whole tile is masked.
    maximum = hidden.new_full((grid.rows,), torch.finfo(dtype).min, dtype=dtype)
    target_logit = torch.full_like(maximum, math.nan)
    return (
        grid,
        grid.buffer(hidden.device, dtype),
        (maximum, torch.zeros_like(maximum), target_logit),
    )


def _finish(maximum: Tensor, sum_exp: Tensor, target_logit: Tensor) -> Statistics:
    return Statistics(target_logit, maximum + sum_exp.log())


def _at(labels: Tensor | None, rows: slice) -> Tensor | None:
    return labels if labels is None else labels[rows]
