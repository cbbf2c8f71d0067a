"""TDPO: DPO with a divergence from the reference at every token."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpref.checks import NonNegative, Positive
from fastpref.losses.pairs import halves, pair_loss, preference_losses
from fastpref.responses import Responses


class TDPOOutput(NamedTuple):
    """What `tdpo` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over pairs, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    rejected_logps: Tensor  #: (B,)
    chosen_rewards: Tensor  #: (B,) ``beta * (logps - ref_logps + alpha * divergences)``
    rejected_rewards: Tensor  #: (B,)
    chosen_divergences: Tensor  #: (B,) nats
    rejected_divergences: Tensor  #: (B,)


@pair_loss
def tdpo(
    responses: Responses,
    ref_logps: Tensor,
    divergences: Tensor,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.5,
    stop_gradient: bool = True,
) -> TDPOOutput:
    r"""Token-level Direct Preference Optimization: DPO that also weighs divergences of tokens.

    .. math:: L = -\log \sigma\left(\beta \left(d - \alpha (K(y_l) - K(y_w))\right)\right), \qquad
              K(y) = \sum_t KL(\pi_{ref}(\cdot | s_t) \, \| \, \pi(\cdot | s_t))

    with the :math:`d` of `dpo`. `TDPO <https://arxiv.org/abs/2404.11999>`_. The defaults are TDPO2,
    with no gradient through :math:`K(y_w)`; TDPO1 is ``alpha=1`` and ``stop_gradient=False``. The
    configuration that the authors released says TDPO1, though their instructions call it TDPO2.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        ref_logps: (2B,) summed log-probabilities under the reference model.
        divergences: (2B,) sums over each response of the forward KL from the reference to the
            policy, over the whole vocabulary, nats: `fastpref.sum_responses` of
            `fastpref.linear_divergence` with the reference in the teacher's place.
        beta: Strength of the pull towards the reference.
        alpha: Weight of the divergences.
        stop_gradient: Whether the chosen response's divergence is held constant in the backward
            pass.

    Returns:
        `TDPOOutput`; the difference of a pair's rewards is what the loss reads.

    Raises:
        ValueError: Tensors that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> ref_logps, divergences = torch.tensor([-4.0, -4.0]), torch.tensor([1.0, 3.0])
        >>> round(tdpo(responses, ref_logps, divergences).loss.item(), 4)
        0.6444
    """
    chosen, rejected = (responses.logps - ref_logps).chunk(2)
    of_chosen, of_rejected = divergences.chunk(2)
    if stop_gradient:
        of_chosen = of_chosen.detach()
    losses = preference_losses(beta * (chosen - rejected - alpha * (of_rejected - of_chosen)))
    rewards = beta * (responses.likelihoods() - ref_logps + alpha * divergences)
    return TDPOOutput(
        losses.mean(), *halves(responses.likelihoods()), *halves(rewards), *halves(divergences)
    )
