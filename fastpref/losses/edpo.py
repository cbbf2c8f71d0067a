"""e-DPO and d-DPO: the policy's log-ratios are regressed onto the rewards of models."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from torch import Tensor

from fastpref.checks import NonNegative, Positive
from fastpref.losses.pairs import Shape, halves, margins, pair_loss
from fastpref.responses import Responses

OfModels = Annotated[
    Tensor,
    Shape(
        "(2B,), one number per response, or (k, 2B), for k reward models",
        lambda sizes, count: len(sizes) in (1, 2) and sizes[-1] == count and 0 not in sizes,
    ),
]


class EDPOOutput(NamedTuple):
    """What `edpo` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over pairs, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    rejected_logps: Tensor  #: (B,)
    chosen_rewards: Tensor  #: (B,) ``beta * (logps - ref_logps)``
    rejected_rewards: Tensor  #: (B,)
    reward_loss: Tensor  #: () the squared error, of the model that is nearest
    kl: Tensor  #: () mean over responses of the reference's log-ratio to the policy, nats


@pair_loss
def edpo(
    responses: Responses,
    ref_logps: Tensor,
    oracle_rewards: OfModels,
    *,
    beta: Positive = 0.1,
    gamma: NonNegative = 0.0,
    aggregate: Literal["min_pair", "min_batch"] = "min_pair",
) -> EDPOOutput:
    r"""Reward model distillation: implicit reward differences match the nearest of k models.

    .. math:: L = \min_i \left(r_i(y_w) - r_i(y_l) - \beta d\right)^2
              + \gamma \, \text{mean of} \log \frac{\pi_{ref}(y)}{\pi(y)}

    with the :math:`d` of `dpo`. One reward model and ``gamma=0`` are d-DPO, several are e-DPO, of
    `Robust Preference Optimization through Reward Model Distillation
    <https://arxiv.org/abs/2405.19316>`_.

    Its authors released no code. Read and confirmed is that implicit rewards are regressed onto
    those of a family of models, pessimistically, and that a forward KL from the reference does it.
    From memory and not verified are the square, the minimum, whether it is taken per pair or per
    batch, that the KL is a mean over the batch's responses, and that :math:`\gamma` multiplies
    it. ``beta`` is ours: the paper's values of it, of :math:`\gamma` and of k are not known
    to us. A mean over models needs no option: its gradient is that of one model with mean rewards.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        ref_logps: (2B,) summed log-probabilities under the reference model.
        oracle_rewards: (2B,) rewards of one model, or (k, 2B) of several.
        beta: Scale of the log-ratios, in rewards.
        gamma: Weight of the log-ratio of reference to policy; 0 leaves it out.
        aggregate: Whether the nearest of several models is that of a pair or of the whole batch.

    Returns:
        `EDPOOutput`.

    Raises:
        ValueError: Tensors of other shapes, a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> rewards = torch.tensor([[1.0, -1.0], [0.5, 0.0]])  # of two models
        >>> edpo(responses, torch.tensor([-4.0, -4.0]), rewards, beta=0.5).loss.item()
        0.25
    """
    ratios = responses.logps - ref_logps
    chosen, rejected = oracle_rewards.reshape(-1, responses.sequences()).chunk(2, 1)
    errors = (chosen - rejected - beta * margins(ratios)).square()  # (k, B)
    reward_loss = errors.amin(0).mean() if aggregate == "min_pair" else errors.mean(1).amin()
    kl = -ratios.mean()
    return EDPOOutput(
        reward_loss + gamma * kl if gamma else reward_loss,
        *halves(responses.likelihoods()),
        *halves(beta * (responses.likelihoods() - ref_logps)),
        reward_loss=reward_loss.detach(),
        kl=kl.detach(),
    )
