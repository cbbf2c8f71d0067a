"""The loss that trains DRDO's oracle."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpref.checks import check_device, check_floating, check_number, check_shape, refuse
from fastpref.losses.pairs import preference_losses


class OracleOutput(NamedTuple):
    """What `oracle_loss` returns; everything but ``loss`` is detached."""

    loss: Tensor  # () mean over pairs, differentiable
    preference_loss: Tensor  # () the Bradley-Terry term
    nll_loss: Tensor  # () mean negative log-probability of the chosen responses, nats


def oracle_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_logps: Tensor,
    *,
    sft_weight: float,
) -> OracleOutput:
    r"""Bradley-Terry loss of a reward head, regularised by the likelihood of the winner.

    .. math:: L = -\log \sigma(r_w - r_l) - \lambda \log \pi(y_w)

    DRDO (Direct Reward Distillation and policy-Optimization), equation 6, mean over pairs.

    Args:
        chosen_rewards: (B,) floating point, for instance from `sequence_rewards`.
        rejected_rewards: (B,).
        chosen_logps: (B,) log-probabilities of the chosen responses, summed or per token as the
            caller likes, in nats.
        sft_weight: :math:`\lambda` (>= 0).

    Returns:
        `OracleOutput`.

    Raises:
        ValueError: Shapes or devices that do not fit, a number that is not finite or out of range.

    Example:
        >>> import torch
        >>> rewards = torch.zeros(4, requires_grad=True)
        >>> out = oracle_loss(rewards[:2], rewards[2:], torch.tensor([-3.0, -5.0]), sft_weight=0.1)
        >>> round(out.loss.item(), 4)
        1.0931
    """
    sft_weight = check_number("sft_weight", sft_weight, at_least=0)
    check_floating("chosen_rewards", chosen_rewards)
    if chosen_rewards.dim() != 1 or not len(chosen_rewards):
        refuse("chosen_rewards", "shape (B,), at least one pair", tuple(chosen_rewards.shape))
    for name, values in (("rejected_rewards", rejected_rewards), ("chosen_logps", chosen_logps)):
        check_floating(name, values)
        check_shape(name, values, chosen_rewards.shape, "(B,) like chosen_rewards")
        check_device(name, values, "chosen_rewards", chosen_rewards)
    preference_loss = preference_losses(chosen_rewards - rejected_rewards).mean()
    nll_loss = -chosen_logps.mean()
    loss = preference_loss + sft_weight * nll_loss
    return OracleOutput(loss, preference_loss.detach(), nll_loss.detach())
