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

# From what a part of the vocabulary has, (k, 1) each: its sum ``E_q (g - g_top)``, and ``g_top`` at
# its own top. To its part of ``E_q g``, and ``E_q g - g_top`` of the whole vocabulary.
Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Pair(NamedTuple):
    """Two distributions over the vocabulary, for some rows: every tensor (k, V), overwritten."""

    q: Tensor  # the student's probabilities
    p: Tensor  # the teacher's
    log_ratio: Tensor  # log(p / q); infinite where one of the two is masked, 0 where both are
    top: Tensor  # (k, 1) int64, one of the student's most probable tokens; is not overwritten
    out: Tensor  # for the gradient
    spare: Tensor
    mixture: Tensor  # 2m / (p + q), once it is known
    join: Join | None = None  # where these are a part of the vocabulary

    def half_tanh(self) -> Tensor:
        """``tanh(log(p/q) / 2) = (p - q) / (p + q)``, with all its digits where p is close to q."""
        return torch.mul(self.log_ratio, 0.5, out=self.out).tanh_()

    def excess(self, half_tanh: Tensor) -> Tensor:
        """``p - q``, in the place of ``p``."""
        return self.p.add_(self.q).mul_(half_tanh)

    def centred(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """``E_q g`` (k,), or this part of the sum, and ``q (g - E_q g)`` in ``out``.

        Relative to the top's ``g``, which is nearly all of the mean where the student is certain.
        """
        of_top = g.gather(1, self.top)
        of_top = of_top.masked_fill(of_top.isinf(), 0)
        terms = times(self.q, torch.sub(g, of_top, out=self.out), out=self.out)
        mean = terms.sum(1, keepdim=True)
        value = mean + of_top
        if self.join is not None:
            value, mean = self.join(mean, of_top)
        return value.squeeze(1), terms.addcmul_(self.q, mean, value=-1)


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
    gradient = torch.mul(pair.log_ratio, -0.5, out=pair.out).tanh_()
    gradient.mul_(torch.add(pair.p, pair.q, out=pair.spare))
    terms = times(pair.p, pair.log_ratio, out=pair.p)
    return terms.add_(gradient).sum(1), gradient


def reverse_kl(pair: Pair, _: Settings) -> tuple[Tensor, Tensor]:
    """``sum q log(q/p)``, ``g = log(q/p)``."""
    excess = pair.excess(pair.half_tanh()).sum(1)
    mean, gradient = pair.centred(pair.log_ratio)
    return excess - mean, gradient.neg_()


def jeffreys(pair: Pair, _: Settings) -> tuple[Tensor, Tensor]:
    """``sum (p - q) log(p/q)``, ``g = -p/q + log(q/p)``."""
    excess = pair.excess(pair.half_tanh())
    values = times(excess, pair.log_ratio, out=pair.spare).sum(1)
    gradient = pair.centred(pair.log_ratio)[1]
    return values, gradient.add_(excess).neg_()


def total_variation(pair: Pair, _: Settings) -> tuple[Tensor, Tensor]:
    """``1/2 sum abs(p - q)``, ``g = 1/2 sign(q - p)``."""
    values = pair.excess(pair.half_tanh()).abs_().sum(1)
    gradient = pair.centred(pair.log_ratio.sign_())[1]
    return values.mul_(0.5), gradient.mul_(-0.5)


def jsd(pair: Pair, settings: Settings) -> tuple[Tensor, Tensor]:
    """``b sum p log(p/m) + (1-b) sum q log(q/m)``, ``g = (1-b) log(q/m)``."""
    share = settings.teacher_share
    larger = _larger_over_mixture(pair, pair.half_tanh(), share)
    log_p = torch.clamp(pair.log_ratio, max=0, out=pair.out).add_(larger)
    of_teacher = times(pair.p, log_p, out=log_p).sum(1)
    above = pair.log_ratio.clamp_(min=0)
    of_student, gradient = pair.centred(torch.sub(larger, above, out=above))
    return of_teacher * share + of_student * (1 - share), gradient.mul_(1 - share)


def skew_kl(pair: Pair, settings: Settings) -> tuple[Tensor, Tensor]:
    """``sum p log(p/m)``, ``m = a p + (1-a) q``, ``g = -(1-a) p/m``."""
    share = settings.teacher_share
    half_tanh = pair.half_tanh()
    larger = _larger_over_mixture(pair, half_tanh, share)
    log_p = pair.log_ratio.clamp_(max=0).add_(larger)
    terms = times(pair.p, log_p, out=pair.spare).sum(1)
    values = terms - (1 - share) * pair.excess(half_tanh).sum(1)
    # Not from the difference of p and m, which loses what is left of p where q is far above it.
    gradient = pair.centred(log_p.exp_())[1]
    return values, gradient.mul_(share - 1)


def skew_reverse_kl(pair: Pair, settings: Settings) -> tuple[Tensor, Tensor]:
    """``sum q log(q/m)``, ``m = (1-a) p + a q``, ``g = log(q/m) - a q/m``.

    A detached mixture leaves ``a q/m`` out of ``g``.
    """
    share = settings.teacher_share  # 1 - a
    half_tanh = pair.half_tanh()
    larger = _larger_over_mixture(pair, half_tanh, share)
    above = pair.log_ratio.clamp_(min=0)
    log_q = torch.sub(larger, above, out=above)
    terms = times(pair.q, log_q, out=pair.spare).sum(1)
    values = terms + share * pair.excess(half_tanh).sum(1)
    if not settings.detach_mixture:
        over_mixture = half_tanh.mul_(2)  # (p - q) / m = (1 - q/m) / (1-a)
        if share != 0.5:
            over_mixture.div_(pair.mixture)
        log_q.add_(over_mixture, alpha=share * (1 - share))
    return values, pair.centred(log_q)[1]


def advantage(pair: Pair, settings: Settings) -> tuple[Tensor, Tensor]:
    """``sum q A``, ``g = A``, with ``A`` in the place of ``log_ratio``; ``p`` is not read."""
    advantages = pair.log_ratio
    if settings.lowest is not None or settings.highest is not None:
        advantages.clamp_(settings.lowest, settings.highest)
    return pair.centred(advantages)


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


def _larger_over_mixture(pair: Pair, half_tanh: Tensor, share: float) -> Tensor:
    """``log(max(p, q) / m)`` in ``spare``; with another share than a half, the mixture in place."""
    tilt, larger = 2 * share - 1, torch.abs(half_tanh, out=pair.spare)
    if tilt == 0:
        return larger.log1p_()
    mixture = torch.mul(half_tanh, tilt, out=pair.mixture).add_(1)
    return larger.sub_(half_tanh, alpha=tilt).div_(mixture).log1p_()
