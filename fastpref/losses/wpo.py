"""WPO: DPO whose pairs count by how likely the policy is to write them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpref.checks import Positive, Smoothing
from fastpref.losses.pairs import halves, margins, pair_loss, preference_losses
from fastpref.responses import Responses


class WPOOutput(NamedTuple):
    """What `wpo` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over pairs, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    rejected_logps: Tensor  #: (B,)
    chosen_rewards: Tensor  #: (B,) ``beta * (logps - ref_logps)``
    rejected_rewards: Tensor  #: (B,)
    weights: Tensor  #: (B,) of the pairs


@pair_loss
def wpo(
    responses: Responses,
    ref_logps: Tensor,
    log_weights: Tensor,
    *,
    beta: Positive = 0.01,
    clamp: bool = True,
    label_smoothing: Smoothing = 0.0,
) -> WPOOutput:
    r"""Weighted Preference Optimization: DPO, each pair times its weight under the policy.

    .. math:: L = -w(y_w) \, w(y_l) \log \sigma(\beta d), \qquad
              w(y) = \exp\left(\frac{1}{|y|} \sum_t \log \frac{\pi(y_t)}{\sum_v \pi(v)^2}\right)

    with the :math:`d` of `dpo`. `WPO <https://arxiv.org/abs/2406.11827>`_, with its sampled
    alignment of weights. They get no gradient. The released code, whose ``beta`` is the default
    here, clamps their product to 1. TRL's ``use_weighting`` does not: there a pair that the policy
    finds likely can count more than once, as with ``clamp=False``.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        ref_logps: (2B,) summed log-probabilities under the reference model.
        log_weights: (2B,) mean per token of the log-probability minus ``log_sum_squared_probs`` of
            `fastpref.linear_stats`, nats.
        beta: Strength of the pull towards the reference.
        clamp: Whether a pair counts once at most.
        label_smoothing: Probability of a flipped label, as in cDPO.

    Returns:
        `WPOOutput`.

    Raises:
        ValueError: Tensors that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> found = wpo(responses, torch.tensor([-4.0, -4.0]), torch.tensor([-0.5, -0.25]))
        >>> round(found.weights.item(), 4), round(found.loss.item(), 4)
        (0.4724, 0.3227)
    """
    chosen, rejected = halves(log_weights)
    of_pairs = chosen + rejected
    weights = (of_pairs.clamp_max(0) if clamp else of_pairs).exp()
    losses = preference_losses(beta * margins(responses.logps - ref_logps), label_smoothing)
    return WPOOutput(
        (weights * losses).mean(),
        *halves(responses.likelihoods()),
        *halves(beta * (responses.likelihoods() - ref_logps)),
        weights=weights,
    )
