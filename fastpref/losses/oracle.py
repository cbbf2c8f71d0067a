"""The loss that trains DRDO's oracle."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpref.checks import NonNegative
from fastpref.losses.pairs import halves, margins, pair_loss, preference_losses
from fastpref.responses import Responses


class OracleOutput(NamedTuple):
    """What `oracle` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over pairs, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    chosen_rewards: Tensor  #: (B,) of the model's reward head
    rejected_rewards: Tensor  #: (B,)
    preference_loss: Tensor  #: () the Bradley-Terry term
    nll_loss: Tensor  #: () mean over pairs of the winner's negative log-probability per token, nats


@pair_loss
def oracle(chosen: Responses, rewards: Tensor, *, sft_weight: NonNegative = 0.1) -> OracleOutput:
    r"""Bradley-Terry loss of a reward head, regularised by the likelihood of the winner.

    .. math:: L = -\log \sigma(r_w - r_l) - \frac{\lambda}{|y_w|} \log \pi(y_w)

    `DRDO <https://arxiv.org/abs/2410.08458>`_ (Direct Reward Distillation and policy-Optimization),
    equation 6, mean over pairs, with the log-probability per token.

    Args:
        chosen: Sums over the B chosen responses, from `fastpref.sum_responses`.
        rewards: (2B,) rewards of chosen and then of rejected responses, for instance from
            `fastpref.sequence_rewards`.
        sft_weight: Weight of the winner's mean negative log-probability per token.

    Returns:
        `OracleOutput`.

    Raises:
        ValueError: Rewards that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> chosen = fastpref.Responses(torch.tensor([-6.0, -5.0]), torch.tensor([2, 1]))
        >>> round(oracle(chosen, torch.zeros(4), sft_weight=0.1).loss.item(), 4)
        1.0931
    """
    preference_loss = preference_losses(margins(rewards)).mean()
    nll_loss = -chosen.per_token(chosen.likelihoods()).mean()
    return OracleOutput(
        preference_loss + sft_weight * nll_loss,
        chosen.likelihoods().detach(),
        *halves(rewards),
        preference_loss=preference_loss.detach(),
        nll_loss=nll_loss.detach(),
    )
