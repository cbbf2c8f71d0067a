"""Every formula once more in the most naive way, with full logits: what tests compare with.

Everything runs in whatever precision it is given, follows autograd, and takes padded tensors only:
hidden (2B, T, H), a head (V, H), labels (2B, T). The library imports none of them.
"""

from __future__ import annotations

import torch
from logit_formulas import divergence, statistics, token_preference
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.ops.head import Head


def logits(hidden: Tensor, head: Head | Tensor, *, temperature: float = 1.0) -> Tensor:
    """The head's logits (..., V)."""
    head = Head(head) if isinstance(head, Tensor) else head
    z = hidden @ head.weight.T
    if head.bias is not None:
        z = z + head.bias
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / temperature


def linear_logps(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probabilities (...) of the labels, 0 where ignored."""
    mask = labels != ignore_index
    log_softmax = logits(hidden, head, temperature=temperature).log_softmax(-1)
    chosen = log_softmax.gather(-1, torch.where(mask, labels, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen, 0)


def linear_logsumexp(hidden: Tensor, head: Head | Tensor, *, temperature: float = 1.0) -> Tensor:
    """Soft values (...): ``temperature * logsumexp(z / temperature)``."""
    return temperature * logits(hidden, head, temperature=temperature).logsumexp(-1)


def linear_stats(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Every statistic (...) of the vocabulary, 0 (False) where ignored."""
    return statistics(
        logits(hidden, head), labels, temperature=temperature, ignore_index=ignore_index
    )


def shaping_from_values(
    values: Tensor,  # (2B, T + 1)
    labels: Tensor,  # (2B, T)
    *,
    gamma: float = 1.0,
    terminal: str = "bootstrap",
    form: str = "difference",
    ignore_index: int = -100,
) -> Tensor:
    """Shaping (2B,), token by token."""
    sums = []
    for row, row_labels in zip(values, labels, strict=True):
        steps = [t for t, label in enumerate(row_labels.tolist()) if label != ignore_index]
        total = row.new_zeros(())
        for t in steps:
            ends = t == steps[-1]
            if form == "next_value":
                total = total + (0 if ends else gamma * row[t + 1])
            else:
                next_value = 0 if ends and terminal == "zero" else row[t + 1]
                total = total + gamma * next_value - row[t]
        sums.append(total)
    return torch.stack(sums)


def teacher_shaping(
    hidden: Tensor,  # (2B, T + 1, H)
    head: Head | Tensor,
    labels: Tensor,  # (2B, T)
    *,
    gamma: float = 1.0,
    terminal: str = "bootstrap",
    form: str = "difference",
    potential: str = "value",
    reference_hidden: Tensor | None = None,  # (2B, T + 1, H_r)
    reference_head: Head | Tensor | None = None,
    beta: float = 0.1,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """Shaping (2B,) from the potentials of all states."""
    if potential == "implicit_reward":
        values = implicit_rewards(
            (hidden, head), (reference_hidden, reference_head), labels,
            beta=beta, ignore_index=ignore_index, temperature=temperature,
        )  # fmt: skip
        return shaping_from_values(
            values, labels, gamma=gamma, terminal=terminal, form=form, ignore_index=ignore_index
        )
    no_labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    stats = linear_stats(hidden, head, no_labels, temperature=temperature)
    values = {
        "value": stats["logsumexp"],
        "max": stats["max_prob"],
        "margin": stats["margin"],
        "expectation": stats["expected_logit"],
    }[potential]
    return shaping_from_values(
        values, labels, gamma=gamma, terminal=terminal, form=form, ignore_index=ignore_index
    )


def implicit_rewards(
    teacher: tuple[Tensor, Head | Tensor],
    reference: tuple[Tensor, Head | Tensor],
    labels: Tensor,  # (2B, T)
    *,
    beta: float,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """Implicit rewards (2B, T + 1) of the tokens before each state, token by token."""
    logps, reference_logps = (
        linear_logps(
            states[:, :-1], head, labels, temperature=temperature, ignore_index=ignore_index
        )
        for states, head in (teacher, reference)
    )
    rows = []
    for gains in beta * (logps - reference_logps):
        values = [gains.new_zeros(())]
        for gain in gains:
            values.append(values[-1] + gain)
        rows.append(torch.stack(values))
    return torch.stack(rows)


def action_rewards(
    hidden: Tensor,  # (2B, T + 1, H)
    head: Head | Tensor,
    labels: Tensor,  # (2B, T)
    *,
    reward: str,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """Sum (2B,) of the logits or log-probabilities of all labels."""
    stats = linear_stats(
        hidden[:, :-1], head, labels, temperature=temperature, ignore_index=ignore_index
    )
    return stats[{"logit": "target_logit", "logp": "target_logp"}[reward]].sum(-1)


def tvkd_loss(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    shaping: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    ref_logps: Tensor | None = None,
    length_normalize: bool = False,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
    sft_weight: float = 0.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """The TVKD loss, pair by pair."""
    logps = linear_logps(hidden, head, labels, temperature=temperature, ignore_index=ignore_index)
    mask = labels != ignore_index
    m = []
    for s in range(len(labels)):
        weights = 1.0 if token_weights is None else token_weights[s][mask[s]]
        total = (weights * logps[s][mask[s]]).sum()
        if ref_logps is not None:
            total = total - ref_logps[s]
        value = beta * total - alpha * shaping[s]
        m.append(value / max(int(mask[s].sum()), 1) if length_normalize else value)
    pairs = len(labels) // 2
    losses = []
    for p in range(pairs):
        d = m[p] - m[pairs + p]
        losses.append(-(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d))
    chosen_tokens = max(int(mask[:pairs].sum()), 1)
    sft = -logps[:pairs].sum() / chosen_tokens
    return torch.stack(losses).mean() + sft_weight * sft


def sequence_rewards(
    hidden: Tensor,  # (2B, T + 1, H)
    labels: Tensor,  # (2B, T)
    head_weight: Tensor,  # (1, H)
    head_bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """Rewards (2B,) of the state after the last labelled token; 0 without any."""
    rewards = []
    for row, row_labels in zip(hidden, labels, strict=True):
        steps = [t for t, label in enumerate(row_labels.tolist()) if label != ignore_index]
        if not steps:
            rewards.append(row.new_zeros(()))
            continue
        reward = row[steps[-1] + 1] @ head_weight.reshape(-1)
        rewards.append(reward if head_bias is None else reward + head_bias.reshape(()))
    return torch.stack(rewards)


def drdo_loss(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    student_rewards: Tensor,
    oracle_rewards: Tensor,
    *,
    alpha: float = 0.1,
    gamma: float = 2.0,
    length_normalize: bool = False,
    detach_focal: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """The DRDO loss, pair by pair."""
    logps = linear_logps(hidden, head, labels, temperature=temperature, ignore_index=ignore_index)
    mask = labels != ignore_index
    z = []
    for s in range(len(labels)):
        total = logps[s][mask[s]].sum()
        z.append(total / max(int(mask[s].sum()), 1) if length_normalize else total)
    pairs = len(labels) // 2
    losses = []
    for p in range(pairs):
        z_w, z_l = z[p], z[pairs + p]
        oracle_gap = oracle_rewards[p] - oracle_rewards[pairs + p]
        student_gap = student_rewards[p] - student_rewards[pairs + p]
        focal = (1 - torch.sigmoid(z_w - z_l)) ** gamma
        if detach_focal:
            focal = focal.detach()
        log_odds = z_w - torch.log(1 - torch.exp(z_l))
        losses.append((oracle_gap - student_gap) ** 2 - alpha * focal * log_odds)
    return torch.stack(losses).mean()


def oracle_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_logps: Tensor, *, sft_weight: float
) -> Tensor:
    """The oracle's loss."""
    return (-logsigmoid(chosen_rewards - rejected_rewards) - sft_weight * chosen_logps).mean()


def dpo(
    logps: Tensor,  # (2B,)
    ref_logps: Tensor,  # (2B,)
    lengths: Tensor,  # (2B,)
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO and cDPO, pair by pair."""
    pairs = len(logps) // 2
    losses = []
    for w, l in zip(range(pairs), range(pairs, 2 * pairs), strict=True):  # noqa: E741  # the papers' names
        d = beta * ((logps[w] - ref_logps[w]) - (logps[l] - ref_logps[l]))
        losses.append(-(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d))
    return torch.stack(losses).mean()


def ipo(
    logps: Tensor,  # (2B,)
    ref_logps: Tensor,  # (2B,)
    lengths: Tensor,  # (2B,)
    *,
    beta: float = 0.1,
    length_normalize: bool = True,
) -> Tensor:
    """IPO, pair by pair."""
    ratios = [
        (one - ref) / max(int(length), 1) if length_normalize else one - ref
        for one, ref, length in zip(logps, ref_logps, lengths, strict=True)
    ]
    pairs = len(logps) // 2
    losses = [(ratios[p] - ratios[pairs + p] - 1 / (2 * beta)) ** 2 for p in range(pairs)]
    return torch.stack(losses).mean()


def linear_divergence(
    student: tuple[Tensor, Head | Tensor],
    teacher: tuple[Tensor, Head | Tensor],
    labels: Tensor,
    *,
    kind: str,
    reference: tuple[Tensor, Head | Tensor] | None = None,
    clip: tuple[float | None, float | None] = (None, None),
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    ignore_index: int = -100,
    **options: float,
) -> Tensor:
    """Divergences (...) of a student from a teacher, each its hidden states and its head."""

    def log_probabilities(model: tuple[Tensor, Head | Tensor], divisor: float) -> Tensor:
        return logits(*model, temperature=divisor).log_softmax(-1)

    log_q = log_probabilities(student, temperature)
    of_teacher = temperature if teacher_temperature is None else teacher_temperature
    log_p = log_probabilities(teacher, of_teacher).detach()
    if reference is None:
        found = divergence(log_q, log_p, kind=kind, **options)
    else:
        gain = log_p - log_probabilities(reference, of_teacher).detach()
        if clip != (None, None):
            gain = gain.clamp(*clip)
        found = (log_q.exp() * gain).sum(-1)
    return torch.where(labels != ignore_index, found, 0)


def linear_token_preference(
    student: tuple[Tensor, Head | Tensor],
    teacher: tuple[Tensor, Head | Tensor],
    labels: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
    tokens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Losses (...) of two tokens at a position, by default the likeliest of teacher and student."""
    log_q, log_p = (
        logits(*model, temperature=temperature).log_softmax(-1) for model in (student, teacher)
    )
    losses = token_preference(log_q, log_p, beta=beta, tokens=tokens)
    return torch.where(labels != ignore_index, losses, 0)
