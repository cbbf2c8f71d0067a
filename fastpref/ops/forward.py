"""One reading of the vocabulary: log-probabilities and logsumexp values, and their Jacobian."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.ops.backend import jacobian_dtype, multiply, statistics_dtype, tile_functions
from fastpref.ops.linear_stats_op import Partial, Sums, merge, partial_of_rows
from fastpref.ops.operands import Logits, Operands
from fastpref.ops.tiling import TileCache, carve, tile_grid


class Statistics(NamedTuple):
    """What the vocabulary says about some rows."""

    logps: Tensor  # (n,) log-probabilities of the labels, empty without labels
    lse: Tensor  # (n,) logsumexp of all logits
    numbers: Tensor  # (n, 3) entropy, the largest logit, the label's; (n, 0) where not wanted


def statistics_by_kernel(operands: Operands, rows: Tensor | None, *, stats: bool) -> Statistics:
    """The statistics of some rows from one kernel that reads the head and holds no tile."""
    if stats:
        sums = Sums(second=False, shortfall=True, squares=False)
        whole, target_logit = partial_of_rows(operands, rows, sums)
        logps = target_logit - whole.maximum - whole.others.log1p()
        return Statistics(logps, whole.lse(), _numbers(whole, target_logit))
    from fastpref.kernels.logsumexp import projection_logsumexp

    found = projection_logsumexp(*operands.for_kernel(rows))
    return _join(*found, operands.labels)


def statistics(
    logits: Logits,
    *,
    cache: Tensor,  # uint8, flat, written: as many tiles of exponentials as it holds
    stats: bool = False,
) -> Statistics:
    """Fold the vocabulary into the statistics of every row: one matrix product."""
    fold_tile = tile_functions(logits.hidden).fold_tile
    running = _start(logits, stats=stats)
    logits = logits.in_dtype_of_products()
    grid = tile_grid(*logits.shape(), running)
    scratch = grid.buffer(running)
    tiles = TileCache(cache, grid, logits.hidden.dtype, scratch.dtype)
    for rows in grid.row_blocks():
        state = running[:, rows].unbind()
        rescale = torch.empty_like(state[0])
        for columns in grid.column_blocks():
            kept = tiles.tile(rows, columns)
            buffer = scratch
            # A product in the dtype of the cache goes straight into it, to be folded in place.
            if kept is not None and kept.exponentials.dtype == scratch.dtype and not stats:
                buffer = kept.exponentials.view(-1)
            fold_tile(
                logits.project(rows, columns, buffer), logits.labels_of(rows), columns.start,
                logits.transform, *state,
                exponentials=None if kept is None else kept.exponentials,
                rescale=None if kept is None else rescale,
            )  # fmt: skip
            if kept is not None:
                kept.maximum.copy_(state[0])
    return _finish(running, logits.labels)


def statistics_and_jacobian(logits: Logits, *, stats: bool = False) -> tuple[Statistics, Tensor]:
    """The statistics, and (n, H) ``d logps / d hidden`` (without labels ``d lse / d hidden``).

    Two matrix products. As in flash attention, each tile of exponentials meets its stretch of the
    weight while it is in cache, relative to a running maximum that later tiles may raise.
    """
    fold_tile = tile_functions(logits.hidden).fold_tile
    jacobian = torch.empty_like(
        logits.hidden,
        dtype=jacobian_dtype(logits.hidden.dtype),
        memory_format=torch.contiguous_format,
    )
    running = _start(logits, stats=stats)
    logits = logits.in_dtype_of_products()
    grid = tile_grid(*logits.shape(), running)
    scratch = grid.buffer(running)
    operands = scratch
    if stats or scratch.dtype != logits.hidden.dtype:
        operands = grid.buffer(logits.hidden)
    for rows in grid.row_blocks():
        state = running[:, rows].unbind()
        maximum, sum_exp, target_logit = state[:3]
        rescale = torch.empty_like(maximum)
        total = logits.hidden.new_empty(logits.hidden[rows].shape, dtype=scratch.dtype)
        for columns in grid.column_blocks():
            tile = logits.project(rows, columns, scratch)
            exponentials = carve(operands, *tile.shape)
            fold_tile(
                tile, logits.labels_of(rows), columns.start, logits.transform, *state,
                exponentials=exponentials, rescale=rescale,
            )  # fmt: skip
            if columns.start > 0:
                total.mul_(rescale.unsqueeze(1))
            multiply(exponentials, logits.weight[columns], total, add=columns.start > 0)
        # The sum is 0 only where every other logit is -inf, and then so is the total.
        total.div_(sum_exp.clamp_min(torch.finfo(sum_exp.dtype).tiny).unsqueeze(1))
        labels = logits.labels_of(rows)
        if labels is not None:
            others = maximum + sum_exp.log()
            label_rows = logits.weight.index_select(0, labels.clamp(0, logits.shape()[1] - 1))
            slope = logits.transform.slope(target_logit)
            slope = slope.unsqueeze(1) if isinstance(slope, Tensor) else slope
            # Wide before the slope, which in a narrow dtype would round, and overflow float16.
            torch.sub(label_rows.to(total.dtype).mul_(slope), total, out=total)
            total.mul_(torch.sigmoid(others - target_logit).unsqueeze(1))
        jacobian[rows] = total
    return _finish(running, logits.labels), jacobian


def _start(logits: Logits, *, stats: bool) -> Tensor:
    """The running numbers (3 or, with ``stats``, 5, n) of `fold_tile`, before the first tile."""
    dtype = statistics_dtype(logits.hidden.dtype)
    running = logits.hidden.new_zeros(5 if stats else 3, logits.hidden.shape[0], dtype=dtype)
    # A finite start: -inf minus -inf would be NaN where a whole tile is masked.
    running[0] = torch.finfo(dtype).min
    running[2] = math.nan
    return running


def _finish(running: Tensor, labels: Tensor | None) -> Statistics:
    """What follows from the running numbers once every column has been seen."""
    maximum, sum_exp, target_logit = running[:3].unbind()
    found = _join(target_logit, maximum + sum_exp.log(), labels)
    if len(running) == 3:
        return found
    nothing, none = torch.zeros_like(maximum), torch.full_like(maximum, -torch.inf)
    others = Partial(torch.where(sum_exp > 0, maximum, none), none, running[3], running[4], nothing)
    label = Partial(target_logit, none, nothing, nothing, nothing)
    whole = merge(Partial(*(torch.stack(one) for one in zip(others, label, strict=True))))
    return found._replace(numbers=_numbers(whole, target_logit))


def _join(target_logit: Tensor, lse_other: Tensor, labels: Tensor | None) -> Statistics:
    """Statistics of a label's logit and of the logsumexp of every other one.

    Keeping the label out of the sum makes ``logps`` and ``1 - p(label)`` exact to their last digits
    also where the model is certain.
    """
    nothing = lse_other.new_empty(len(lse_other), 0)
    if labels is None:
        return Statistics(lse_other.new_empty(0), lse_other, nothing)
    lse = torch.logaddexp(target_logit, lse_other)
    return Statistics(logsigmoid(target_logit - lse_other), lse, nothing)


def _numbers(whole: Partial, target_logit: Tensor) -> Tensor:
    """`Statistics.numbers`; the entropy is NaN beside a label outside the vocabulary."""
    entropy = whole.entropy().masked_fill(target_logit.isnan(), torch.nan)
    return torch.stack((entropy, whole.maximum, target_logit), dim=1)
