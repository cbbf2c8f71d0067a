"""ORPO: the likelihood of the winner, and the odds of winner against loser."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpref.checks import NonNegative
from fastpref.losses.drdo import log1mexp
from fastpref.losses.pairs import halves, margins, pair_loss, preference_losses
from fastpref.responses import Responses


class ORPOOutput(NamedTuple):
    """What `orpo` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over pairs, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    rejected_logps: Tensor  #: (B,)
    chosen_rewards: Tensor  #: (B,) ``beta`` times the mean log-probability per token
    rejected_rewards: Tensor  #: (B,)
    nll_loss: Tensor  #: () mean negative log-probability of the chosen tokens, nats
    odds_loss: Tensor  #: () mean of the odds-ratio term, before ``beta``
    log_odds: Tensor  #: (B,) log of the odds ratio


@pair_loss
def orpo(
    responses: Responses, *, beta: NonNegative = 0.1, sft_weight: NonNegative = 1.0
) -> ORPOOutput:
    r"""Odds Ratio Preference Optimization: fine-tuning that also penalises the loser's odds.

    .. math:: L = -\frac{\sum \log \pi(y_w)}{\sum |y_w|} - \lambda \log \sigma\left(\log
              \frac{p_w}{1 - p_w} - \log \frac{p_l}{1 - p_l}\right), \qquad
              p = \pi(y)^{1 / |y|}

    `ORPO <https://arxiv.org/abs/2403.07691>`_, whose :math:`\lambda` is ``beta``, as in TRL. The
    released code has 1.0 for it, TRL 0.1. That the paper trains with 0.1 to 0.25 is from memory.

    The first term here is of response tokens. The released code (unless ``--disable_prompt_loss``)
    and TRL take it over the prompt, too. That is ``sft_weight=0`` here, and beside it `sft` of sums
    over labels that cover prompt and chosen response.

    The odds stay exact up to :math:`p = 1`, where they are the largest that the dtype holds.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        beta: Weight of the odds-ratio term.
        sft_weight: Weight of the mean negative log-probability of the chosen tokens.

    Returns:
        `ORPOOutput`; rewards are ``beta * logps`` per token.

    Raises:
        ValueError: An odd number of responses, a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> found = orpo(responses)
        >>> round(found.loss.item(), 4), found.nll_loss.item()
        (1.5271, 1.5)
    """
    means = responses.per_token(responses.logps)
    log_odds = margins(means - log1mexp(means))
    odds_loss = preference_losses(log_odds).mean()
    nll_loss = responses.chosen_nll()
    return ORPOOutput(
        sft_weight * nll_loss + beta * odds_loss,
        *halves(responses.likelihoods()),
        *halves(beta * responses.per_token(responses.likelihoods())),
        nll_loss=nll_loss.detach(),
        odds_loss=odds_loss.detach(),
        log_odds=log_odds.detach(),
    )
