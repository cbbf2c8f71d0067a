r"""Each kind of divergence, elementwise: its value and its gradient with respect to the logits.

With the student's probabilities ``q``, the teacher's ``p`` and :math:`E_q f = \sum_j q_j f_j`,
every kind has :math:`\partial D / \partial s_j = q_j (g_j - E_q g)` with its own ``g``, which a
constant added to it does not change.

Two terms that cancel in the sum over the vocabulary, like ``p log(p/q)`` and ``q - p``, are added
up: where the teacher is all but the student, ``p log(p/q)`` alone is a sum of large terms of
either sign, and an error of a normaliser would be the larger part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Two distributions over the vocabulary, for some rows: every tensor (k, V), overwritten."""

    q: Tensor  # the student's probabilities
    p: Tensor  # the teacher's
    log_ratio: Tensor  # log(p / q); infinite where one of the two is masked, 0 where both are
    out: Tensor  # for the gradient
    spare: Tensor
    mixture: Tensor  # 2m / (p + q), once it is known

    def half_tanh(self) -> Tensor:
        """``tanh(log(p/q) / 2) = (p - q) / (p + q)``, with all its digits where p is close to q."""
        return torch.mul(self.log_ratio, 0.5, out=self.out).tanh_()

    def excess(self, half_tanh: Tensor) -> Tensor:
        """``p - q``, in the place of ``p``."""
        return self.p.add_(self.q).mul_(half_tanh)


class Settings(NamedTuple):
    """Numbers of some kinds."""

    teacher_share: float  # of the mixture m = share * p + (1 - share) * q
    detach_mixture: bool
    lowest: float | None  # of the advantage
    highest: float | None


# Value (k,) and gradient (k, V) of a pair of distributions.
Kind = Callable[[Pair, Settings], tuple[Tensor, Tensor]]


def forward_kl(pair: Pair, _: Settings) -> tuple[Tensor, Tensor]:
    """``sum p log(p/q)``, ``g = -p/q``: the gradient is ``q - p``."""
    gradient = pair.half_tanh()
    sums = torch.add(pair.p, pair.q, out=pair.spare)
    gradient.mul_(sums).neg_()
    terms = times(pair.p, pair.log_ratio, out=pair.p)
    return terms.add_(gradient).sum(1), gradient


def reverse_kl(pair: Pair, _: Settings) -> tuple[Tensor, Tensor]:
    """``sum q log(q/p)``, ``g = log(q/p)``."""
    excess = pair.excess(pair.half_tanh()).sum(1)
    terms = times(pair.q, pair.log_ratio, out=pair.out)
    mean, gradient = centred(terms, pair.q)
    return excess - mean, gradient.neg_()


def jeffreys(pair: Pair, _: Settings) -> tuple[Tensor, Tensor]:
    """``sum (p - q) log(p/q)``, ``g = -p/q + log(q/p)``."""
    excess = pair.excess(pair.half_tanh())
    terms = times(pair.q, pair.log_ratio, out=pair.out)
    _mean, gradient = centred(terms, pair.q)
    values = times(excess, pair.log_ratio, out=pair.log_ratio).sum(1)
    return values, gradient.add_(excess).neg_()


def total_variation(pair: Pair, _: Settings) -> tuple[Tensor, Tensor]:
    """``1/2 sum abs(p - q)``, ``g = 1/2 sign(q - p)``."""
    values = pair.excess(pair.half_tanh()).abs_().sum(1)
    terms = torch.sign(pair.log_ratio, out=pair.out).mul_(pair.q)
    _mean, gradient = centred(terms, pair.q)
    return values.mul_(0.5), gradient.mul_(-0.5)


def jsd(pair: Pair, settings: Settings) -> tuple[Tensor, Tensor]:
    """``b sum p log(p/m) + (1-b) sum q log(q/m)``, ``g = (1-b) log(q/m)``."""
    share = settings.teacher_share
    larger = _larger_over_mixture(pair, pair.half_tanh(), share)
    above = torch.clamp(pair.log_ratio, min=0, out=pair.out)
    of_student = times(pair.q, torch.sub(larger, above, out=above), out=above)
    log_p = pair.log_ratio.clamp_(max=0).add_(larger)
    of_teacher = times(pair.p, log_p, out=log_p).sum(1)
    mean, gradient = centred(of_student, pair.q)
    return of_teacher * share + mean * (1 - share), gradient.mul_(1 - share)


def skew_kl(pair: Pair, settings: Settings) -> tuple[Tensor, Tensor]:
    """``sum p log(p/m)``, ``m = a p + (1-a) q``, ``g = -(1-a) p/m``."""
    share = settings.teacher_share
    half_tanh = pair.half_tanh()
    larger = _larger_over_mixture(pair, half_tanh, share)
    log_p = pair.log_ratio.clamp_(max=0).add_(larger)
    terms = times(pair.p, log_p, out=log_p).sum(1)
    excess = pair.excess(half_tanh).sum(1)
    over_mixture = half_tanh.mul_(2).div_(pair.mixture)  # (p - q) / m
    _mean, gradient = centred(over_mixture.mul_(pair.q), pair.q)
    return terms - (1 - share) * excess, gradient.mul_(-((1 - share) ** 2))


def skew_reverse_kl(pair: Pair, settings: Settings) -> tuple[Tensor, Tensor]:
    """``sum q log(q/m)``, ``m = (1-a) p + a q``, ``g = log(q/m) - a q/m``.

    A detached mixture leaves ``a q/m`` out of ``g``.
    """
    share = settings.teacher_share  # 1 - a
    half_tanh = pair.half_tanh()
    larger = _larger_over_mixture(pair, half_tanh, share)
    above = pair.log_ratio.clamp_(min=0)
    terms = times(pair.q, torch.sub(larger, above, out=above), out=above)
    values = terms.sum(1) + share * pair.excess(half_tanh).sum(1)
    if not settings.detach_mixture:
        over_mixture = half_tanh.mul_(2).div_(pair.mixture)  # (p - q) / m
        terms.add_(over_mixture.mul_(pair.q), alpha=share * (1 - share))
    _mean, gradient = centred(terms, pair.q)
    return values, pair.out.copy_(gradient)


def advantage(pair: Pair, settings: Settings) -> tuple[Tensor, Tensor]:
    """``sum q A``, ``g = A``, with ``A`` in the place of ``log_ratio``; ``p`` is not read."""
    advantages = pair.log_ratio
    if settings.lowest is not None or settings.highest is not None:
        advantages.clamp_(settings.lowest, settings.highest)
    return centred(times(pair.q, advantages, out=pair.out), pair.q)


KINDS: dict[str, Kind] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "jeffreys": jeffreys,
    "advantage": advantage,
}
SIGNED = ("advantage",)  # all others are never below 0


def times(weights: Tensor, logs: Tensor, out: Tensor) -> Tensor:
    """``weights * logs``, 0 where the weight is 0 and the logarithm infinite; NaN becomes 0."""
    return torch.mul(weights, logs, out=out).nan_to_num_(0, math.inf, -math.inf)


def centred(terms: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``E_q g`` (k,), and in place ``q (g - E_q g)``, from ``q g``."""
    mean = terms.sum(1)
    return mean, terms.addcmul_(q, mean.unsqueeze(1), value=-1)


def _larger_over_mixture(pair: Pair, half_tanh: Tensor, share: float) -> Tensor:
    """``log(max(p, q) / m)`` in ``spare``, and the mixture in its place."""
    tilt = 2 * share - 1
    mixture = torch.mul(half_tanh, tilt, out=pair.mixture).add_(1)
    larger = torch.abs(half_tanh, out=pair.spare).sub_(half_tanh, alpha=tilt)
    return larger.div_(mixture).log1p_()
