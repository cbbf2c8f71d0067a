"""Frontiers: the most true return that a method gives for a KL, compared over worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = Sequence[tuple[float, float]]  # KL from the SFT student in nats, return
Numbers = NDArray[np.float64]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Gain:
    """A method's return above the SFT student's for at most so many nats: means over worlds."""

    method: str
    kl: float
    gain: float
    low: float  # 95 % interval, by resampling worlds
    high: float
    ahead: float  # of the method that all are compared with, in the same worlds
    ahead_low: float
    ahead_high: float


def frontier(points: Points, start: float) -> tuple[Numbers, Numbers]:
    """KLs and returns of the corners of the frontier, from the SFT student (0, ``start``) on.

    It is the upper concave hull up to the highest point. Between two policies lie their mixtures:
    one of both is drawn for each response. That mixes returns, and its KL is at most the mixture
    of theirs. Behind the highest point the frontier stays level.
    """
    corners = [(0.0, start)]
    for point in sorted(points):
        while len(corners) > 1 and _slope(corners[-2], point) >= _slope(corners[-2], corners[-1]):
            corners.pop()
        if point[1] > corners[-1][1]:
            corners.append(point)
    kls, returns = np.array(corners, dtype=np.float64).T
    return kls, returns


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / max(other[0] - one[0], 1e-12)


def gains_at(points: Points, start: float, kls: Sequence[float] | Numbers) -> Numbers:
    """Return above ``start`` at each KL."""
    return np.interp(kls, *frontier(points, start)) - start


def interval(values: Numbers, seed: int = 0) -> tuple[Numbers, Numbers]:
    """95 % bootstrap interval of the mean over worlds (worlds, ...), the first dimension."""
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, RESAMPLES)
    means = np.tensordot(draws / count, values, 1)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def summarize(
    points: Mapping[str, Sequence[Points]],  # by method, one for each world
    starts: Sequence[float],  # the SFT student's return in each world
    kls: Sequence[float],
    *,
    against: str,
) -> list[Gain]:
    """Every method at every KL; ``against`` is one of the methods."""
    gains = {
        method: np.array(
            [gains_at(each, start, kls) for each, start in zip(worlds, starts, strict=True)]
        )
        for method, worlds in points.items()
    }
    rows = []
    for method in gains:
        ahead = gains[method] - gains[against]
        columns = (
            gains[method].mean(0),
            *interval(gains[method]),
            ahead.mean(0),
            *interval(ahead),
        )
        rows += [
            Gain(method, kl, *map(float, numbers))
            for kl, *numbers in zip(kls, *columns, strict=True)
        ]
    return rows
