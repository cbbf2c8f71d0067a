"""The custom operator under `linear_stats`: one reading of the vocabulary, without gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import statistics_dtype, uses_triton
from fastpref.ops.operands import SCHEMA, Logits, Operands, register, spread
from fastpref.ops.tiling import carve
from fastpref.ops.torch_tiles import label_columns, largest


class Sums(NamedTuple):
    """Which numbers of a `Partial` are wanted; the others are left at 0 (``second`` at -inf)."""

    second: bool
    shortfall: bool
    squares: bool


class Partial(NamedTuple):
    """Some logits ``z`` of a row, as seen from ``top``, one that is as large as any.

    Leaving the top out of the sums keeps the digits of ``1 - p(top)``, of the entropy and of every
    log-probability where the model is certain: none of these is a difference of large numbers.
    Of no logits at all (or none above -inf) the maximum is -inf and every sum 0. Where one is +inf
    the sums mean nothing.
    """

    maximum: Tensor  # z(top)
    second: Tensor  # the largest logit but the top, -inf where there is none
    others: Tensor  # sum of exp(z - maximum) over all but the top
    shortfall: Tensor  # sum of exp(z - maximum) * (maximum - z)
    squares: Tensor  # sum of exp(z - maximum) ** 2 over all but the top

    def lse(self) -> Tensor:
        """Logsumexp of the logits."""
        return self.maximum + self.others.log1p()

    def entropy(self) -> Tensor:
        """Entropy of their softmax in nats, with no difference of large numbers; NaN of none."""
        entropy = self.others.log1p() + self.shortfall / (1 + self.others)
        return entropy.masked_fill(self.maximum.isinf(), torch.nan)


def partial_of_tile(logits: Tensor, sums: Sums) -> Partial:
    """The numbers (n,) of a tile of logits (n, w), which is overwritten."""
    maximum, top = largest(logits)
    logits.scatter_(1, top.unsqueeze(1), -torch.inf)
    nothing = torch.zeros_like(maximum)
    second = logits.amax(1) if sums.second else torch.full_like(maximum, -torch.inf)
    lowest = torch.finfo(logits.dtype).min
    # Finite, so that neither -inf minus -inf nor 0 times -inf makes a NaN of a masked logit.
    difference = logits.sub_(maximum.clamp_min(lowest).unsqueeze(1)).clamp_min_(lowest)
    if sums.shortfall:
        exponentials = difference.exp()
        shortfall = difference.mul_(exponentials).sum(1).neg_()
    else:
        exponentials, shortfall = difference.exp_(), nothing
    others = exponentials.sum(1)
    squares = exponentials.square_().sum(1) if sums.squares else nothing
    return Partial(maximum, second, others, shortfall, squares)


def merge(parts: Partial) -> Partial:
    """Join parts (k, n) that share no logit into the numbers (n,) of all their logits."""
    maximum, top = parts.maximum.max(0)
    is_top = torch.zeros_like(parts.maximum, dtype=torch.bool)
    is_top.scatter_(0, top.unsqueeze(0), True)
    finfo = torch.finfo(maximum.dtype)
    difference = (maximum.clamp_min(finfo.min) - parts.maximum).clamp_max(finfo.max)
    weight = torch.exp(-difference)
    # A part's own top is one more of the others, but for that of all parts.
    tops = weight.masked_fill(is_top, 0)
    return Partial(
        maximum,
        torch.maximum(parts.maximum.masked_fill(is_top, -torch.inf).amax(0), parts.second.amax(0)),
        (weight * parts.others + tops).sum(0),
        (weight * (parts.shortfall + difference * parts.others) + difference * tops).sum(0),
        (weight.square() * parts.squares + tops.square()).sum(0),
    )


def stats_of_operands(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The numbers (N, 5) of a `Partial` of the whole vocabulary, and the labels' logits (N,).

    Without ``labels`` there are no labels' logits: (0,). Rows that ``compact`` leaves out are 0.
    """
    operands, sums = Operands.split(arguments)
    rows, count = operands.rows(), operands.hidden.shape[0]
    if operands.count(rows) == 0:
        numbers, target_logit = _outputs(*arguments)
        return numbers.zero_(), target_logit.zero_()
    found, target_logit = partial_of_rows(operands, rows, Sums(*sums))
    if operands.labels is not None:
        target_logit = spread(target_logit, rows, count)
    return spread(torch.stack(found, dim=1), rows, count), target_logit


def _outputs(*arguments: Any) -> tuple[Tensor, Tensor]:
    hidden, _, _, labels, *_ = arguments
    dtype, count = statistics_dtype(hidden.dtype), hidden.shape[0]
    return (
        hidden.new_empty((count, len(Partial._fields)), dtype=dtype),
        hidden.new_empty(0 if labels is None else count, dtype=dtype),
    )


linear_stats_ops = register(
    "linear_stats",
    stats_of_operands,
    _outputs,
    f"({SCHEMA}, bool second, bool shortfall, bool squares) -> (Tensor, Tensor)",
)


def partial_of_rows(operands: Operands, rows: Tensor | None, sums: Sums) -> tuple[Partial, Tensor]:
    """Numbers (n,) of the whole vocabulary for some rows, and their labels' logits (n,) or (0,)."""
    if not uses_triton(operands.hidden):
        return _partial(operands.logits(rows), sums)
    from fastpref.kernels.statistics import projection_partials

    parts, target_logit = projection_partials(*operands.for_kernel(rows), *sums)
    return merge(Partial(*parts)), target_logit


def _partial(logits: Logits, sums: Sums) -> tuple[Partial, Tensor]:
    """The same in PyTorch, tile by tile."""
    count, vocab_size = logits.shape()
    scratch = logits.hidden.new_empty(0, dtype=statistics_dtype(logits.hidden.dtype))
    grid = logits.grid_by_columns(scratch)
    scratch = grid.tile_buffer(scratch)
    numbers = scratch.new_empty(len(Partial._fields), count)
    target_logit = scratch.new_full((0 if logits.labels is None else count,), math.nan)
    for rows in grid.row_blocks():
        running = numbers[:, rows]
        labels, hidden = logits.labels_of(rows), logits.hidden_of(rows)
        for columns in grid.column_blocks():
            tile = carve(scratch, len(hidden), columns.stop - columns.start)
            logits.transform.apply_(logits.project(hidden, columns, tile))
            if labels is not None:
                column, inside = label_columns(labels, columns.start, tile.shape[1])
                at_label = tile.gather(1, column).squeeze(1)
                target_logit[rows] = torch.where(inside, at_label, target_logit[rows])
            found = torch.stack(partial_of_tile(tile, sums))
            if columns.start > 0:
                found = torch.stack(merge(Partial(*torch.stack((running, found), dim=1))))
            running.copy_(found)
    return Partial(*numbers), target_logit
