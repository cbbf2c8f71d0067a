"""Formulas of logits and log-probabilities of the whole vocabulary, in the most naive way.

Everything runs in whatever precision it is given and follows autograd. The library imports none of
them; `benchmarks/errors.py` does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def statistics(
    q: Tensor, labels: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> dict[str, Tensor]:
    """Every statistic (...) of logits (..., V), 0 (False) where ignored."""
    log_p = (q / temperature).log_softmax(-1)
    p = log_p.exp()
    mask = labels != ignore_index
    at_label = torch.where(mask, labels, 0).unsqueeze(-1)
    sorted_p = torch.nn.functional.pad(p, (0, 1)).sort(-1, descending=True).values
    target_logit = q.gather(-1, at_label).squeeze(-1)
    stats = {
        "logsumexp": temperature * (q / temperature).logsumexp(-1),
        "max_prob": sorted_p[..., 0],
        "margin": sorted_p[..., 0] - sorted_p[..., 1],
        "expected_logit": torch.where(p > 0, p * q, 0).sum(-1),
        "entropy": -torch.where(p > 0, p * log_p, 0).sum(-1),
        "target_logit": target_logit,
        "target_logp": log_p.gather(-1, at_label).squeeze(-1),
        "log_sum_squared_probs": p.square().sum(-1).log(),
        "is_top1": target_logit == q.amax(-1),
    }
    return {name: values.masked_fill(~mask, 0) for name, values in stats.items()}


def divergence(
    log_q: Tensor,
    log_p: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    alpha: float = 0.1,
    detach_mixture: bool = False,
) -> Tensor:
    """Divergence (...) of two distributions, given as log-probabilities (..., V)."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        a = log_a.exp()
        return torch.where(a > 0, a * (log_a - log_b), 0).sum(-1)

    def mixture(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
        return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))

    if kind == "jsd":
        log_m = mixture(beta, log_p, log_q)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    if kind == "skew_kl":
        return kl(log_p, mixture(alpha, log_p, log_q))
    if kind == "skew_reverse_kl":
        log_m = mixture(alpha, log_q.detach() if detach_mixture else log_q, log_p)
        return kl(log_q, log_m)
    if kind == "total_variation":
        return (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
    return {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jeffreys": lambda: kl(log_p, log_q) + kl(log_q, log_p),
    }[kind]()


def token_preference(
    log_q: Tensor,
    log_p: Tensor,
    *,
    beta: float,
    tokens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Losses (...) of two tokens at a position, from log-probabilities (..., V)."""
    first, second = (log_p.argmax(-1), log_q.argmax(-1)) if tokens is None else tokens
    ratio, of_teacher = (
        (one.gather(-1, first.unsqueeze(-1)) - one.gather(-1, second.unsqueeze(-1))).squeeze(-1)
        for one in (log_q, log_p.detach())
    )
    return -logsigmoid(beta * (ratio - of_teacher.to(ratio.dtype)))


def topk_divergence(log_q: Tensor, ids: Tensor, log_p: Tensor, *, tail: str) -> Tensor:
    """Divergences (...) of a student, from a teacher's log-probabilities (..., K) of some tokens.

    A token of -inf is none; the student's log-probabilities (..., V) are of all tokens.
    """
    known = log_p > -torch.inf
    ids = ids.masked_fill(~known, 0)
    log_p = log_p.to(log_q.dtype)
    at_tokens = log_q.gather(-1, ids)
    if tail == "renormalize":
        log_p, at_tokens = (
            one - one.masked_fill(~known, -torch.inf).logsumexp(-1, keepdim=True)
            for one in (log_p, at_tokens)
        )
    terms = torch.where(known, log_p.exp() * (log_p - at_tokens), 0)
    if tail == "bucket":
        named = torch.zeros_like(log_q).scatter_add(-1, ids, known.to(log_q.dtype))
        some = (named == 0).any(-1)  # tokens are left
        of_q = log_q.masked_fill((named > 0) & some.unsqueeze(-1), -torch.inf).logsumexp(-1)
        of_p = (1 - log_p.exp().sum(-1)).clamp_min(1e-30).log()
        terms[..., 0] += torch.where(some, of_p.exp() * (of_p - of_q), 0)
    return torch.where(known.any(-1), terms.nan_to_num(0).sum(-1), 0)
