"""CPO: summed log-probabilities without a reference, kept up by the likelihood of the winner."""

from __future__ import annotations

from fastpref.checks import NonNegative, Positive, Smoothing
from fastpref.losses.pairs import LossOutput, margins, pair_loss, pair_output, preference_losses
from fastpref.responses import Responses


@pair_loss
def cpo(
    responses: Responses,
    *,
    beta: Positive = 0.1,
    sft_weight: NonNegative = 1.0,
    label_smoothing: Smoothing = 0.0,
) -> LossOutput:
    r"""Contrastive Preference Optimization: DPO with a uniform reference, beside the likelihood.

    .. math:: L = -\log \sigma(\beta \log \pi(y_w) - \beta \log \pi(y_l))
              - \alpha \frac{\sum \log \pi(y_w)}{\sum |y_w|}

    `CPO <https://arxiv.org/abs/2401.08417>`_, whose :math:`\alpha` is ``sft_weight``. The paper's
    second term is the sum over a response. Its released code takes the mean over all chosen tokens
    of the batch, and so do TRL, Liger and this function. Liger takes means in the first term, too,
    unless ``average_log_prob=False``. CPO-SimPO is `simpo` with ``sft_weight=1``.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        beta: Scale of the log-probabilities.
        sft_weight: Weight of the mean negative log-probability of the chosen tokens.
        label_smoothing: Probability of a flipped label, as in cDPO.

    Returns:
        `LossOutput`; rewards are ``beta * logps``.

    Raises:
        ValueError: An odd number of responses, a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> round(cpo(responses).loss.item(), 4)
        2.0981
    """
    losses = preference_losses(beta * margins(responses.logps), label_smoothing)
    return pair_output(losses, responses, beta * responses.likelihoods(), sft_weight)
