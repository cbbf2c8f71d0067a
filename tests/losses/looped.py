"""Losses of sums once more in the most naive way, response by response: what tests compare with.

They follow autograd in whatever precision they are given. ``lengths`` are int64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pairs_of(values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Chosen and rejected ones of (2B,) numbers."""
    half = len(values) // 2
    return [(values[p], values[half + p]) for p in range(half)]


def nll(logps: Tensor, lengths: Tensor) -> Tensor:
    """Mean negative log-probability of all tokens."""
    return -sum(logps) / max(int(sum(lengths)), 1)


def bradley_terry(d: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(d)``, of a flipped label with some probability."""
    return -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)


def mean(losses: list[Tensor]) -> Tensor:
    return sum(losses) / len(losses)


def sft(logps: Tensor, lengths: Tensor) -> Tensor:
    return nll(logps, lengths)


def cpo(
    logps: Tensor, lengths: Tensor, *, beta: float, sft_weight: float, label_smoothing: float
) -> Tensor:
    losses = [bradley_terry(beta * (w - l), label_smoothing) for w, l in pairs_of(logps)]  # noqa: E741  # the papers' name
    half = len(losses)
    return mean(losses) + sft_weight * nll(logps[:half], lengths[:half])


def orpo(logps: Tensor, lengths: Tensor, *, beta: float, sft_weight: float) -> Tensor:
    losses, half = [], len(logps) // 2
    for p in range(half):
        log_odds = []
        for s in (p, half + p):
            z = logps[s] / max(int(lengths[s]), 1)
            log_odds.append(z - torch.log(1 - torch.exp(z)))
        losses.append(bradley_terry(log_odds[0] - log_odds[1]))
    return sft_weight * nll(logps[:half], lengths[:half]) + beta * mean(losses)


def kto(
    logps: Tensor,
    lengths: Tensor,
    ref_logps: Tensor,
    kl_log_ratios: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    z0 = max(float(kl_log_ratios.mean()), 0.0)
    losses = []
    for s in range(len(logps)):
        ratio = logps[s] - ref_logps[s]
        if desirable[s]:
            losses.append(desirable_weight * (1 - torch.sigmoid(beta * (ratio - z0))))
        else:
            losses.append(undesirable_weight * (1 - torch.sigmoid(beta * (z0 - ratio))))
    return mean(losses)


def wpo(
    logps: Tensor,
    lengths: Tensor,
    ref_logps: Tensor,
    log_weights: Tensor,
    *,
    beta: float,
    clamp: bool,
    label_smoothing: float,
) -> Tensor:
    losses = []
    each = zip(pairs_of(logps - ref_logps), pairs_of(log_weights), strict=True)
    for (chosen, rejected), (of_chosen, of_rejected) in each:
        weight = float(torch.exp(of_chosen) * torch.exp(of_rejected))
        weight = min(weight, 1.0) if clamp else weight
        losses.append(weight * bradley_terry(beta * (chosen - rejected), label_smoothing))
    return mean(losses)


def tdpo(
    logps: Tensor,
    lengths: Tensor,
    ref_logps: Tensor,
    divergences: Tensor,
    *,
    beta: float,
    alpha: float,
    stop_gradient: bool,
) -> Tensor:
    losses = []
    each = zip(pairs_of(logps - ref_logps), pairs_of(divergences), strict=True)
    for (chosen, rejected), (of_chosen, of_rejected) in each:
        of_chosen = of_chosen.detach() if stop_gradient else of_chosen
        losses.append(bradley_terry(beta * (chosen - rejected - alpha * (of_rejected - of_chosen))))
    return mean(losses)


def edpo(
    logps: Tensor,
    lengths: Tensor,
    ref_logps: Tensor,
    oracle_rewards: Tensor,  # (2B,) or (k, 2B)
    *,
    beta: float,
    gamma: float,
    aggregate: str,
) -> Tensor:
    models = oracle_rewards if oracle_rewards.dim() == 2 else oracle_rewards[None]
    errors = [  # by model, by pair
        [
            ((of_chosen - of_rejected) - beta * (chosen - rejected)) ** 2
            for (of_chosen, of_rejected), (chosen, rejected) in zip(
                pairs_of(rewards), pairs_of(logps - ref_logps), strict=True
            )
        ]
        for rewards in models
    ]
    if aggregate == "min_batch":
        loss = min(mean(of_model) for of_model in errors)
    else:
        loss = mean([min(of_pair) for of_pair in zip(*errors, strict=True)])
    return loss + gamma * mean(list(ref_logps - logps))


def kd(
    logps: Tensor, lengths: Tensor, divergences: Tensor, *, weight: float, sft_weight: float
) -> Tensor:
    tokens = max(int(sum(lengths)), 1)
    return weight * sum(divergences) / tokens + sft_weight * nll(logps, lengths)


def dckd(
    logps: Tensor,
    lengths: Tensor,
    divergences: Tensor,
    *,
    chosen_weight: float,
    rejected_weight: float,
    sft_weight: float,
) -> Tensor:
    half = len(logps) // 2
    loss = sft_weight * nll(logps[:half], lengths[:half])
    loss = loss + chosen_weight * sum(divergences[:half]) / max(int(sum(lengths[:half])), 1)
    return loss + rejected_weight * sum(divergences[half:]) / max(int(sum(lengths[half:])), 1)


def adpa(
    logps: Tensor, lengths: Tensor, advantages: Tensor, *, weight: float, sft_weight: float
) -> Tensor:
    half = len(logps) // 2
    loss = sft_weight * nll(logps[:half], lengths[:half])
    return loss - weight * sum(advantages) / max(int(sum(lengths[half:])), 1)


def dpkd(
    logps: Tensor, lengths: Tensor, teacher_logps: Tensor, *, beta: float, length_normalize: bool
) -> Tensor:
    rewards = []
    for s in range(len(logps)):
        length = max(int(lengths[s]), 1) if length_normalize else 1
        rewards.append(beta * (logps[s] - teacher_logps[s]) / length)
    each = pairs_of(torch.stack(rewards))
    return mean([bradley_terry(chosen - rejected) for chosen, rejected in each])
