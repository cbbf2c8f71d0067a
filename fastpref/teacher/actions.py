"""Rewards that depend on the action: what potential-based shaping is compared with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpref.checks import check_choice
from fastpref.ops import Head, linear_stats
from fastpref.ops.linear_stats import Statistic
from fastpref.sequences import check_pairs, check_states, labels_of_states, sequence_sum

ActionReward = Literal["logit", "logp"]
ACTION_REWARDS: dict[ActionReward, Statistic] = {"logit": "target_logit", "logp": "target_logp"}


@torch.no_grad()
def action_rewards(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    reward: ActionReward,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    compact: bool = True,
) -> Tensor:
    r"""Sum of a teacher's action-dependent reward over every response: an ablation, not a shaping.

    .. math:: R(y) = \sum_t Q(s_t, a_t) \quad\text{or}\quad \sum_t \log \pi(a_t | s_t)

    Table 5 of TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025). Unlike the
    potentials of `fastpref.teacher_shaping` these can change which policy is best. They go where a
    shaping goes: ``tvkd_loss(..., shaping=action_rewards(...))``. Runs without gradients.

    Args:
        hidden: (2B, T + 1, H) the teacher's hidden states *unshifted*, as in `teacher_shaping`, or
            packed (N, H); float64, float32, float16 or bfloat16.
        head: The teacher's `Head`, or its weight (V, H), in the dtype of ``hidden``.
        labels: (2B, T) integers, already shifted, or packed (N,).
        reward: ``"logit"`` or ``"logp"``.
        temperature: Divides the logits of ``"logp"``.
        cu_seqlens: (2B + 1,) integers, the boundaries of packed sequences, chosen ones first.
        ignore_index: The label of positions outside the response.
        compact: Read the head at labelled positions only; see `linear_logps`.

    Returns:
        (2B,) in the unit of the logits, or in nats; float32 (float64 for float64 inputs).

    Raises:
        ValueError: As `fastpref.teacher_shaping`.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(50, 8)
        >>> labels = torch.tensor([[-100, 7, 8, 9], [-100, 3, 4, -100]])
        >>> action_rewards(hidden, weight, labels, reward="logp").shape
        torch.Size([2])
    """
    check_choice("reward", reward, tuple(ACTION_REWARDS))
    labels, cu_seqlens = check_pairs(labels, cu_seqlens, ignore_index)
    check_states("hidden", hidden, labels, cu_seqlens, vectors=True)
    found = linear_stats(
        hidden,
        head,
        labels_of_states(labels, cu_seqlens, ignore_index),
        stats=(ACTION_REWARDS[reward],),
        temperature=temperature,
        ignore_index=ignore_index,
        compact=compact,
    )
    return sequence_sum(found[ACTION_REWARDS[reward]], cu_seqlens)
