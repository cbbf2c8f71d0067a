"""What the shaping of pairs says of their labels, in numbers."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.inspection.signals import Signal

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval
ROUNDING = 1e-9  # what is left of a gap that the lengths explain is no gap


class Share(NamedTuple):
    """A share of pairs with its 95 % interval, each from 0 to 1."""

    share: float  #: of the pairs that were looked at
    low: float  #: where the interval begins
    high: float  #: where it ends

    @property
    def side(self) -> int:
        """1 above one half, -1 below it, 0 where the interval does not say."""
        return (self.low > 0.5) - (self.high < 0.5)


class SignalMeasures(NamedTuple):
    """What one signal of a teacher says of the pairs; gaps are chosen less rejected."""

    name: str  #: of the signal
    pairs: int  #: how many were looked at
    ranked_first: Share  #: of pairs whose chosen response has the larger shaping
    without_length: Share  #: the same of what a multiple of the difference of lengths leaves
    length_correlation: float | None  #: Pearson's, with the difference of lengths in tokens
    mean_gap: float  #: in the unit of the shaping, nats or logits
    gap_std: float  #: the gaps' standard deviation, in the same unit
    alpha: float | None  #: at which the shaping's gap is as large as beta times the student's
    student_correlation: float | None  #: Pearson's, with the student's gap


def measure(signal: Signal, length_gaps: Tensor, student_gaps: Tensor | None) -> SignalMeasures:
    """Measure a signal beside each pair's lengths and the student's gap, (pairs,) float64 both."""
    chosen, rejected = signal.sums().unbind(1)
    gaps = chosen - rejected
    spread = float(gaps.std())
    alpha = correlation_with_student = None
    if student_gaps is not None:
        alpha = float(student_gaps.std()) / spread if spread else None
        correlation_with_student = correlation(gaps, student_gaps)
    return SignalMeasures(
        name=signal.name,
        pairs=len(gaps),
        ranked_first=share_above_zero(gaps),
        without_length=share_above_zero(without(gaps, length_gaps)),
        length_correlation=correlation(gaps, length_gaps),
        mean_gap=float(gaps.mean()),
        gap_std=spread,
        alpha=alpha,
        student_correlation=correlation_with_student,
    )


def share_above_zero(gaps: Tensor) -> Share:
    """The share of gaps above 0, where a gap of 0 counts half; Wilson's interval."""
    wins = float((gaps > 0).sum() + (gaps == 0).sum() / 2)
    return Share(wins / len(gaps), *wilson_interval(wins, len(gaps)))


def wilson_interval(wins: float, count: int) -> tuple[float, float]:
    r"""Wilson's 95 % interval of a share, :math:`p` with :math:`(\hat p - p)^2 = z^2 p(1-p)/n`."""
    share, spread = wins / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = (spread * (share * (1 - share) + spread / 4)) ** 0.5 / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def without(gaps: Tensor, length_gaps: Tensor) -> Tensor:
    """What is left of gaps when the multiple of the lengths' gaps that is nearest is taken away.

    No constant is fitted: swapping a pair's responses has to swap the signs and nothing else.
    """
    size = length_gaps.square().sum()
    left = gaps - length_gaps * ((gaps * length_gaps).sum() / size if size else 0.0)
    return left.masked_fill(left.abs() <= ROUNDING * gaps.abs(), 0)


def correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's correlation; None where one of the two does not vary."""
    found = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    return found if found == found else None
