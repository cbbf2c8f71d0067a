"""Histograms as the page draws them: places and sizes, and the same in words."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 24  # an even number: 0 is between two of them
WIDTH, HEIGHT = 320.0, 110.0
WITHIN = 0.98  # of the gaps are within the axis; the outermost bars have the rest


class Bar(NamedTuple):
    """A bar of a histogram, from its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    side: str  # which response the pairs in it rank first


class Histogram(NamedTuple):
    """How many pairs have a gap of each size; the axis is symmetrical."""

    bars: list[Bar]
    line: str  # the outline of a second histogram, as points of a polyline
    limit: float  # the axis goes from -limit to limit
    alt: str


def histogram(gaps: Tensor, name: str) -> Histogram:
    """The gaps (pairs,) of one signal."""
    limit = _limit(gaps)
    counts = _counts(gaps, limit)
    alt = (
        f"Histogram of the gap of {name} over {len(gaps)} pairs: median {gaps.median():.3g}, "
        f"from {gaps.min():.3g} to {gaps.max():.3g}."
    )
    return Histogram(_bars(counts, counts.max()), "", limit, alt)


def two_histograms(gaps: Tensor, others: Tensor, name: str) -> Histogram:
    """The gaps (pairs,) of a signal and of the student, on one axis, in one unit."""
    limit = max(_limit(gaps), _limit(others))
    counts, outline = _counts(gaps, limit), _counts(others, limit)
    highest = torch.maximum(counts.max(), outline.max())
    tops = (HEIGHT * (1 - outline / highest)).tolist()
    step = WIDTH / BINS
    points = [(step * edge, top) for place, top in enumerate(tops) for edge in (place, place + 1)]
    alt = (
        f"Histograms on one axis: the gap of {name} has a standard deviation of {gaps.std():.3g}, "
        f"beta times the student's of {others.std():.3g}."
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Histogram(_bars(counts, highest), line, limit, alt)


def _limit(gaps: Tensor) -> float:
    return float(gaps.abs().quantile(WITHIN)) or float(gaps.abs().max()) or 1.0


def _counts(gaps: Tensor, limit: float) -> Tensor:
    """How many gaps each bin has: (BINS,)."""
    places = ((gaps / limit + 1) / 2 * BINS).floor().long()
    return torch.bincount(places.clamp(0, BINS - 1), minlength=BINS)


def _bars(counts: Tensor, highest: Tensor) -> list[Bar]:
    step = WIDTH / BINS
    heights = (HEIGHT * counts / highest).tolist()
    return [
        Bar(step * place, HEIGHT - height, step - 1, height, _side(place))
        for place, height in enumerate(heights)
        if height
    ]


def _side(place: int) -> str:
    return "rejected" if place < BINS // 2 else "chosen"
