"""SimPO: length-normalised log-probabilities with a target margin, and no reference."""

from __future__ import annotations

from fastpref.checks import NonNegative, Positive, Smoothing
from fastpref.losses.pairs import LossOutput, margins, pair_loss, pair_output, preference_losses
from fastpref.responses import Responses


@pair_loss
def simpo(
    responses: Responses,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 0.5,
    label_smoothing: Smoothing = 0.0,
    sft_weight: NonNegative = 0.0,
) -> LossOutput:
    r"""Simple Preference Optimization: the mean log-probability per token is the reward.

    .. math:: L = -\log \sigma\left(\frac{\beta}{|y_w|} \log \pi(y_w)
              - \frac{\beta}{|y_l|} \log \pi(y_l) - \gamma\right)

    `SimPO <https://arxiv.org/abs/2405.14734>`_, whose released code writes :math:`\gamma` as
    ``beta * gamma_beta_ratio``: its defaults, 2.0 and 0.25, are these. TRL's ``CPOTrainer`` with
    ``loss_type="simpo"`` has a ``beta`` of 0.1, and adds the likelihood with weight 1 unless told.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        beta: Scale of the mean log-probabilities.
        gamma: Margin that the chosen reward should be ahead by.
        label_smoothing: Probability of a flipped label, as in cDPO.
        sft_weight: Weight of the mean negative log-probability of the chosen tokens.

    Returns:
        `LossOutput`; rewards are ``beta * logps`` per token.

    Raises:
        ValueError: An odd number of responses, a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> round(simpo(responses).loss.item(), 4)
        0.2014
    """
    means = responses.per_token(responses.logps)
    losses = preference_losses(beta * margins(means) - gamma, label_smoothing)
    rewards = beta * responses.per_token(responses.likelihoods())
    return pair_output(losses, responses, rewards, sft_weight)
