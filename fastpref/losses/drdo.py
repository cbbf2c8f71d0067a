"""DRDO: match an oracle's reward differences while learning preferences from focal log-odds."""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.checks import check_flag, check_labels, check_number
from fastpref.losses.fused import fused_drdo_pairs, runs_fused
from fastpref.losses.pairs import SequenceSums, sequence_sums
from fastpref.ops import HeadOptions, linear_logps
from fastpref.ops.head import check_options
from fastpref.sequences import check_pairs, check_per_sequence, offsets


class DRDOOutput(NamedTuple):
    """What `drdo_loss` returns; everything but ``loss`` is detached."""

    loss: Tensor  # () mean over pairs, differentiable
    chosen_logps: Tensor  # (B,) summed log-probabilities, nats
    rejected_logps: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,) the student's rewards
    rejected_rewards: Tensor  # (B,)
    reward_loss: Tensor  # () mean squared error of the reward differences
    preference_loss: Tensor  # () mean of the focal log-odds term, alpha included


def drdo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    student_rewards: Tensor,
    oracle_rewards: Tensor,
    *,
    alpha: float = 0.1,
    gamma: float = 2.0,
    length_normalize: bool = False,
    detach_focal: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    **head_options: Unpack[HeadOptions],
) -> DRDOOutput:
    r"""Reward distillation with a focal log-odds preference term, without the logits.

    .. math:: L = (\Delta r^* - \Delta \hat r)^2
              - \alpha (1 - p_w)^\gamma \log \frac{\pi_\theta(y_w)}{1 - \pi_\theta(y_l)},
              \qquad p_w = \sigma(z_w - z_l), \quad z = \log \pi_\theta(y | x)

    DRDO (Direct Reward Distillation and policy-Optimization), equation 7.

    ``length_normalize=False`` is the formula as written: with summed log-probabilities the
    probability of any real response is about 0 and :math:`p_w` is 0 or 1, so the term acts as a
    switched log-likelihood of the chosen response. ``True`` takes :math:`z` per token, where the
    focal factor and the odds are alive; prefer it for responses of more than a few tokens.

    Args:
        hidden: (2B, T, H) the student's hidden states, chosen rows first, or packed (N, H);
            float64, float32, float16 or bfloat16.
        weight: (V, H) the student's head, in the dtype of ``hidden`` (autocast casts both).
        labels: (2B, T) integers, already shifted, ``ignore_index`` outside the response; or (N,).
        student_rewards: (2B,) from `sequence_rewards`.
        oracle_rewards: (2B,) the oracle's rewards, in the same unit.
        alpha: Weight of the preference term (>= 0).
        gamma: Exponent of the focal factor (>= 0); the paper's best is 2.
        length_normalize: Use mean log-probabilities a token instead of sums.
        detach_focal: Hold the focal factor constant in the backward pass.
        cu_seqlens: (2B + 1,) integers, the boundaries of packed sequences, chosen ones first.
        ignore_index: The label of positions outside the response.
        **head_options: ``bias``, ``temperature``, ``logit_scale``, ``softcap``, ``compact`` and
            ``scratch_bytes``, as in `linear_logps`.

    Returns:
        `DRDOOutput`. A response without labels counts as zero log-probability.

    Raises:
        ValueError: Rows that are not pairs, shapes, devices or dtypes that do not fit, labels
            outside the vocabulary, wrong ``cu_seqlens``, a number not finite or out of range.

    Example:
        >>> hidden = torch.randn(2, 3, 8, requires_grad=True)
        >>> weight = torch.randn(50, 8)
        >>> labels = torch.tensor([[4, 9, 2], [1, 3, -100]])
        >>> rewards = torch.zeros(2, requires_grad=True)
        >>> out = drdo_loss(hidden, weight, labels, rewards, torch.tensor([1.0, -1.0]))
        >>> out.loss.backward()
        >>> rewards.grad
        tensor([-4.,  4.])
    """
    check_options("drdo_loss", head_options)
    check_labels(labels, hidden)
    labels, cu_seqlens, sequences = check_pairs(
        labels, cu_seqlens, ignore_index, read=head_options.get("compact", True)
    )
    alpha = check_number("alpha", alpha, at_least=0)
    gamma = check_number("gamma", gamma, at_least=0)
    check_flag("length_normalize", length_normalize)
    check_flag("detach_focal", detach_focal)
    check_per_sequence("student_rewards", student_rewards, sequences, labels)
    check_per_sequence("oracle_rewards", oracle_rewards, sequences, labels)

    logps = linear_logps(hidden, weight, labels, ignore_index=ignore_index, **head_options)
    mask = labels != ignore_index
    student_rewards = student_rewards.to(logps.dtype)
    oracle_rewards = oracle_rewards.to(logps.dtype)
    if runs_fused(logps, constants=(oracle_rewards,)):
        losses, sums = fused_drdo_pairs(
            logps, mask, offsets(labels, cu_seqlens), student_rewards, oracle_rewards,
            alpha, gamma, length_normalize, detach_focal,
        )  # fmt: skip
    else:
        losses, sums = _drdo_pairs(
            logps, mask, cu_seqlens, student_rewards, oracle_rewards,
            alpha, gamma, length_normalize, detach_focal,
        )  # fmt: skip
    loss = losses.mean()
    with torch.no_grad():
        # Each from its own formula: what the loss has beside a large term is lost in rounding.
        reward_loss = reward_losses(student_rewards, oracle_rewards).mean()
        preference_loss = focal_losses(sums, alpha, gamma, length_normalize).mean()
    chosen_logps, rejected_logps = sums.logps.detach().chunk(2)
    chosen_rewards, rejected_rewards = student_rewards.detach().chunk(2)
    return DRDOOutput(
        loss,
        chosen_logps,
        rejected_logps,
        chosen_rewards,
        rejected_rewards,
        reward_loss,
        preference_loss,
    )


def reward_losses(student_rewards: Tensor, oracle_rewards: Tensor) -> Tensor:
    """Squared errors (B,) of the student's reward differences, from rewards (2B,)."""
    chosen, rejected = (oracle_rewards - student_rewards).chunk(2)
    return (chosen - rejected).square()


def focal_losses(
    sums: SequenceSums,
    alpha: float,
    gamma: float,
    length_normalize: bool,
    detach_focal: bool = False,
) -> Tensor:
    """The focal log-odds term (B,) of the pairs, sign and ``alpha`` included."""
    z = sums.per_token(sums.logps) if length_normalize else sums.logps
    chosen, rejected = z.chunk(2)
    log_odds = chosen - log1mexp(rejected)
    focal = torch.exp(gamma * logsigmoid(rejected - chosen))
    if detach_focal:
        focal = focal.detach()
    return -alpha * focal * log_odds


def log1mexp(logps: Tensor) -> Tensor:
    """``log(1 - exp(logps))`` for ``logps <= 0``, finite and differentiable up to 0 itself.

    A probability closer to one than the dtype's epsilon can't be told from one and counts as that
    close, with no gradient.
    """
    logps = logps.clamp_max(-torch.finfo(logps.dtype).eps)
    near_zero = logps > -math.log(2)
    # Each branch sees only arguments that it is exact for, so that neither gives a NaN gradient.
    from_expm1 = torch.log(-torch.expm1(torch.where(near_zero, logps, -1.0)))
    from_log1p = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, logps)))
    return torch.where(near_zero, from_expm1, from_log1p)


def _drdo_pairs(
    logps: Tensor,  # (2B, T) or (N,)
    mask: Tensor,  # (2B, T) or (N,) bool
    cu_seqlens: Tensor | None,  # (2B + 1,)
    student_rewards: Tensor,  # (2B,)
    oracle_rewards: Tensor,  # (2B,)
    alpha: float,
    gamma: float,
    length_normalize: bool,
    detach_focal: bool,
) -> tuple[Tensor, SequenceSums]:
    """The formula, in PyTorch: losses (B,) of the pairs, and the sums they come from."""
    sums = sequence_sums(logps, mask, cu_seqlens)
    focal = focal_losses(sums, alpha, gamma, length_normalize, detach_focal)
    return reward_losses(student_rewards, oracle_rewards) + focal, sums
