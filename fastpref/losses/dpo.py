"""DPO, with cDPO's label smoothing, and IPO: a policy against its reference."""

from __future__ import annotations

from torch import Tensor

from fastpref.checks import Positive, Smoothing
from fastpref.losses.pairs import LossOutput, margins, pair_loss, pair_output, preference_losses
from fastpref.responses import Responses


@pair_loss
def dpo(
    responses: Responses,
    ref_logps: Tensor,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> LossOutput:
    r"""Direct Preference Optimization: the policy's log-ratios are its rewards.

    .. math:: L = -(1 - \epsilon) \log \sigma(\beta d) - \epsilon \log \sigma(-\beta d), \qquad
              d = \log \frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_{ref}(y_l)}

    `DPO <https://arxiv.org/abs/2305.18290>`_; :math:`\epsilon > 0` is its authors'
    `cDPO <https://ericmitchell.ai/cdpo.pdf>`_.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        ref_logps: (2B,) summed log-probabilities under the reference model.
        beta: Strength of the pull towards the reference.
        label_smoothing: Probability of a flipped label, as in cDPO.

    Returns:
        `LossOutput`; rewards are ``beta * (logps - ref_logps)``.

    Raises:
        ValueError: Tensors that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> round(dpo(responses, torch.tensor([-4.0, -4.0])).loss.item(), 4)
        0.5981
    """
    losses = preference_losses(beta * margins(responses.logps - ref_logps), label_smoothing)
    return pair_output(losses, responses, beta * (responses.likelihoods() - ref_logps))


@pair_loss
def ipo(
    responses: Responses,
    ref_logps: Tensor,
    *,
    beta: Positive = 0.1,
    length_normalize: bool = True,
) -> LossOutput:
    r"""Identity Preference Optimization: log-ratios that differ by a set margin, no more.

    .. math:: L = \left(d - \frac{1}{2 \beta}\right)^2, \qquad
              d = \log \frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_{ref}(y_l)}

    `IPO <https://arxiv.org/abs/2310.12036>`_, whose :math:`\tau` is ``beta``. The paper writes
    sums over a response. TRL and HALOs take means per token, and so does the default here. The two
    differ by about a response's length in :math:`d`: a ``beta`` does not carry over.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        ref_logps: (2B,) summed log-probabilities under the reference model.
        beta: Half the inverse of the margin that is aimed at.
        length_normalize: Whether log-ratios are means per token, as in TRL, instead of the paper's
            sums.

    Returns:
        `LossOutput`; rewards are ``beta * (logps - ref_logps)``, per token under
        ``length_normalize``.

    Raises:
        ValueError: Tensors that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> ipo(responses, torch.tensor([-4.0, -4.0]), beta=0.5).loss.item()
        0.0
    """
    ratios = responses.logps - ref_logps
    rewards = beta * (responses.likelihoods() - ref_logps)
    if length_normalize:
        ratios, rewards = responses.per_token(ratios), responses.per_token(rewards)
    losses = (margins(ratios) - 1 / (2 * beta)).square()
    return pair_output(losses, responses, rewards)
