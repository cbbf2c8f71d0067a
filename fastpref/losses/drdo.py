"""DRDO: match an oracle's reward differences while learning preferences from focal log-odds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.checks import NonNegative
from fastpref.losses.pairs import halves, margins, pair_loss
from fastpref.responses import Responses


class DRDOOutput(NamedTuple):
    """What `drdo` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over pairs, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    rejected_logps: Tensor  #: (B,)
    chosen_rewards: Tensor  #: (B,) of the student's reward head
    rejected_rewards: Tensor  #: (B,)
    reward_loss: Tensor  #: () mean squared error of the reward differences
    preference_loss: Tensor  #: () mean of the focal log-odds term, alpha included


@pair_loss
def drdo(
    responses: Responses,
    student_rewards: Tensor,
    oracle_rewards: Tensor,
    *,
    alpha: NonNegative = 0.1,
    gamma: NonNegative = 2.0,
    length_normalize: bool = False,
    detach_focal: bool = False,
) -> DRDOOutput:
    r"""Reward distillation with a focal log-odds preference term.

    .. math:: L = (\Delta r^* - \Delta \hat r)^2
              - \alpha (1 - p_w)^\gamma \log \frac{\pi_\theta(y_w)}{1 - \pi_\theta(y_l)},
              \qquad p_w = \sigma(z_w - z_l), \quad z = \log \pi_\theta(y | x)

    `DRDO <https://arxiv.org/abs/2410.08458>`_ (Direct Reward Distillation and policy-Optimization),
    equation 7.

    ``length_normalize=False`` is the formula as written: with summed log-probabilities the
    probability of any real response is about 0 and :math:`p_w` is 0 or 1, so the term acts as a
    switched log-likelihood of the chosen response. ``True`` takes :math:`z` per token, where the
    focal factor and the odds are alive; prefer it for responses of more than a few tokens.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        student_rewards: (2B,) from `fastpref.sequence_rewards`.
        oracle_rewards: (2B,) the oracle's rewards, in the same unit.
        alpha: Weight of the preference term.
        gamma: Exponent of the focal factor; the paper's best is 2.
        length_normalize: Whether the preference term reads mean log-probabilities per token instead
            of sums; with sums it is all but switched off for responses of real length.
        detach_focal: Whether the focal factor is held constant in the backward pass.

    Returns:
        `DRDOOutput`.

    Raises:
        ValueError: Tensors that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> rewards = torch.zeros(2, requires_grad=True)
        >>> drdo(responses, rewards, torch.tensor([1.0, -1.0])).loss.backward()
        >>> rewards.grad
        tensor([-4.,  4.])
    """
    reward_losses = margins(oracle_rewards - student_rewards).square()
    z = responses.per_token(responses.logps) if length_normalize else responses.logps
    chosen, rejected = z.chunk(2)
    focal = torch.exp(gamma * logsigmoid(rejected - chosen))
    if detach_focal:
        focal = focal.detach()
    preference_losses = -alpha * focal * (chosen - log1mexp(rejected))
    losses = reward_losses + preference_losses
    return drdo_output(losses, reward_losses, preference_losses, responses, student_rewards)


def drdo_output(
    losses: Tensor,  # (B,)
    reward_losses: Tensor,  # (B,)
    preference_losses: Tensor,  # (B,)
    responses: Responses,
    student_rewards: Tensor,  # (2B,)
) -> DRDOOutput:
    """The means of the pairs' losses and of their two terms."""
    return DRDOOutput(
        losses.mean(),
        *halves(responses.likelihoods()),
        *halves(student_rewards),
        reward_loss=reward_losses.detach().mean(),
        preference_loss=preference_losses.detach().mean(),
    )


def log1mexp(logps: Tensor) -> Tensor:
    """``log(1 - exp(logps))`` for ``logps <= 0``, finite and differentiable up to 0 itself.

    `linear_logps` gives ``-1e-10`` with all its digits, so only what is closer to 0 than the
    dtype's smallest normal number counts as that close, with no gradient.
    """
    logps = logps.clamp_max(-torch.finfo(logps.dtype).tiny)
    near_zero = logps > -math.log(2)
    # Each branch sees only arguments that it is exact for, so that neither gives a NaN gradient.
    from_expm1 = torch.log(-torch.expm1(torch.where(near_zero, logps, -1.0)))
    from_log1p = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, logps)))
    return torch.where(near_zero, from_expm1, from_log1p)
