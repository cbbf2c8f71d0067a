"""One reading of the vocabulary: log-probabilities and logsumexp values, and their Jacobian."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.ops.backend import jacobian_dtype, multiply, statistics_dtype, tile_functions
from fastpref.ops.linear_stats_op import Partial, Sums, merge, partial_of_rows
from fastpref.ops.operands import Logits, Operands, take
from fastpref.ops.tiling import TileCache, carve, tile_grid


class Running(NamedTuple):
    """What is known of rows (n,) from the columns so far, but the labels'; see `fold_tile`."""

    maximum: Tensor
    sum_exp: Tensor
    target_logit: Tensor
    rest: Tensor | None  # None, as the next, where no statistics are wanted
    shortfall: Tensor | None

    @classmethod
    def start(cls, logits: Logits, *, stats: bool) -> Running:
        """Of no column."""
        dtype = statistics_dtype(logits.hidden.dtype)
        # A finite start: -inf minus -inf would be NaN where a whole tile is masked.
        maximum = logits.hidden.new_full(
            (logits.hidden.shape[0],), torch.finfo(dtype).min, dtype=dtype
        )
        zeros = torch.zeros_like(maximum)
        more = (zeros.clone(), zeros.clone()) if stats else (None, None)
        return cls(maximum, zeros, torch.full_like(maximum, math.nan), *more)

    def of(self, rows: slice) -> Running:
        """Views of some rows."""
        return Running._make(None if one is None else one[rows] for one in self)

    def finish(self, labels: Tensor | None) -> Statistics:
        """What follows once every column has been seen."""
        maximum, sum_exp, target_logit, rest, shortfall = self
        found = Statistics.join(target_logit, maximum + sum_exp.log(), labels)
        if rest is None or shortfall is None:
            return found
        nothing, none = torch.zeros_like(rest), torch.full_like(rest, -torch.inf)
        others = Partial(torch.where(sum_exp > 0, maximum, none), none, rest, shortfall, nothing)
        label = Partial(target_logit, none, nothing, nothing, nothing)
        both = Partial(*(torch.stack(one) for one in zip(others, label, strict=True)))
        return found._replace(whole=merge(both))


class Statistics(NamedTuple):
    """What the vocabulary says about some rows."""

    logps: Tensor  # (n,) log-probabilities of the labels, empty without labels
    lse: Tensor  # (n,) logsumexp of all logits
    target_logit: Tensor  # (n,) the labels' logits; NaN for a label outside the vocabulary
    whole: Partial | None = None  # numbers of all logits, where more statistics are wanted

    @classmethod
    def join(cls, target_logit: Tensor, lse_other: Tensor, labels: Tensor | None) -> Statistics:
        """Statistics of a label's logit and of the logsumexp of every other one.

        Keeping the label out of the sum makes ``logps`` and ``1 - p(label)`` exact to their last
        digits also where the model is certain.
        """
        if labels is None:
            return cls(lse_other.new_empty(0), lse_other, target_logit)
        lse = torch.logaddexp(target_logit, lse_other)
        return cls(logsigmoid(target_logit - lse_other), lse, target_logit)

    def numbers(self) -> Tensor:
        """(n, 3) entropy, NaN for a label outside the vocabulary, largest and label's logit."""
        assert self.whole is not None
        entropy = self.whole.entropy().masked_fill(self.target_logit.isnan(), torch.nan)
        return torch.stack((entropy, self.whole.maximum, self.target_logit), dim=1)


def statistics_by_kernel(operands: Operands, rows: Tensor | None, *, stats: bool) -> Statistics:
    """The statistics of some rows from one kernel that reads the head and holds no tile."""
    if stats:
        sums = Sums(second=False, shortfall=True, squares=False)
        whole, target_logit = partial_of_rows(operands, rows, sums)
        logps = target_logit - whole.maximum - whole.others.log1p()
        return Statistics(logps, whole.lse(), target_logit, whole)
    from fastpref.kernels.logsumexp import projection_logsumexp

    hidden, weight, bias, labels = operands[:4]
    labels = None if labels is None else take(labels, rows)
    found = projection_logsumexp(hidden, weight, bias, labels, rows, operands.transform())
    return Statistics.join(*found, labels)


def statistics(
    logits: Logits,
    *,
    cache: Tensor,  # uint8, flat, written: as many tiles of exponentials as it holds
    stats: bool = False,
) -> Statistics:
    """Fold the vocabulary into the statistics of every row: one matrix product."""
    fold_tile = tile_functions(logits.hidden).fold_tile
    running = Running.start(logits, stats=stats)
    logits = logits.in_dtype_of_products()
    grid = tile_grid(*logits.shape(), running.maximum)
    scratch = grid.buffer(running.maximum)
    tiles = TileCache(cache, grid, logits.hidden.dtype, scratch.dtype)
    for rows in grid.row_blocks():
        maximum, sum_exp, target_logit, *more = running.of(rows)
        rescale = torch.empty_like(maximum)
        for columns in grid.column_blocks():
            kept = tiles.tile(rows, columns)
            buffer = scratch
            # A product in the dtype of the cache goes straight into it, to be folded in place.
            if kept is not None and kept.exponentials.dtype == scratch.dtype and not stats:
                buffer = kept.exponentials.view(-1)
            fold_tile(
                logits.project(rows, columns, buffer), logits.labels_of(rows), columns.start,
                logits.transform, maximum, sum_exp, target_logit, *more,
                *((None, None) if kept is None else (kept.exponentials, rescale)),
            )  # fmt: skip
            if kept is not None:
                kept.maximum.copy_(maximum)
    return running.finish(logits.labels)


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
    running = Running.start(logits, stats=stats)
    logits = logits.in_dtype_of_products()
    grid = tile_grid(*logits.shape(), running.maximum)
    scratch = grid.buffer(running.maximum)
    operands = scratch
    if stats or scratch.dtype != logits.hidden.dtype:
        operands = grid.buffer(logits.hidden)
    for rows in grid.row_blocks():
        maximum, sum_exp, target_logit, *more = running.of(rows)
        rescale = torch.empty_like(maximum)
        total = logits.hidden.new_empty(logits.hidden[rows].shape, dtype=scratch.dtype)
        for columns in grid.column_blocks():
            tile = logits.project(rows, columns, scratch)
            exponentials = carve(operands, *tile.shape)
            fold_tile(
                tile, logits.labels_of(rows), columns.start, logits.transform,
                maximum, sum_exp, target_logit, *more, exponentials, rescale,
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
    return running.finish(logits.labels), jacobian
