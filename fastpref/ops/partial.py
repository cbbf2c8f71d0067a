"""Running numbers over a stretch of the vocabulary from which every statistic of it follows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """Which numbers of a `Partial` are wanted; the others are left at 0 (``second`` at -inf)."""

    second: bool
    shortfall: bool
    squares: bool


class Partial(NamedTuple):
    """Some logits ``z`` of a row, as seen from ``top``, one that is as large as any.

    Leaving the top out of the sums keeps the digits of ``1 - p(top)``, of the entropy and of every
    log-probability where the model is certain: none of these is a difference of large numbers.
    Of no logits at all (or none above -inf) the maximum is -inf and every sum 0.
    """

    maximum: Tensor  # z(top)
    second: Tensor  # the largest logit but the top, -inf where there is none
    others: Tensor  # sum of exp(z - maximum) over all but the top
    shortfall: Tensor  # sum of exp(z - maximum) * (maximum - z)
    squares: Tensor  # sum of exp(z - maximum) ** 2 over all but the top


def partial_of_tile(logits: Tensor, sums: Sums) -> Partial:
    """The numbers (n,) of a tile of logits (n, w), which is overwritten."""
    maximum, top = logits.max(1)
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
