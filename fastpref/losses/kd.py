"""Distillation token by token: VanillaKD, GKD and DCKD, from sums of divergences."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpref.checks import NonNegative
from fastpref.losses.pairs import halves, pair_loss, unpaired_loss
from fastpref.responses import Responses, token_mean


class KDOutput(NamedTuple):
    """What `vanilla_kd` and `gkd` return; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over tokens, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    chosen_divergence: Tensor  #: () mean over tokens, nats
    nll_loss: Tensor  #: () mean negative log-probability of the tokens, nats


class DCKDOutput(NamedTuple):
    """What `dckd` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over tokens, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    rejected_logps: Tensor  #: (B,)
    chosen_divergence: Tensor  #: () mean over tokens, nats
    rejected_divergence: Tensor  #: ()
    nll_loss: Tensor  #: () mean negative log-probability of the chosen tokens, nats


@unpaired_loss
def vanilla_kd(
    chosen: Responses,
    divergences: Tensor,
    *,
    weight: NonNegative = 1.0,
    sft_weight: NonNegative = 0.0,
) -> KDOutput:
    r"""Knowledge distillation: the teacher's distribution at every token of the chosen responses.

    .. math:: L = \frac{1}{\sum |y|} \sum_{y} \sum_t
              \left(w \, KL(p(\cdot | s_t) \, \| \, \pi(\cdot | s_t)) - \lambda \log \pi(y_t)\right)

    `Distillation <https://arxiv.org/abs/1503.02531>`_ as papers on language models compare with,
    where it has no factor of the squared temperature. The TVKD paper's code has a ``weight`` of 0.1
    and no likelihood. Those of MiniLLM and DistiLLM write the cross-entropy, with the same
    gradients and other values, and weigh it ``k`` to the likelihood's ``1 - k``.

    Args:
        chosen: Sums over B responses, from `fastpref.sum_responses`.
        divergences: (B,) sums over each response of the forward KL from the teacher to the
            student, nats: `fastpref.sum_responses` of `fastpref.linear_divergence`.
        weight: Weight of the mean divergence.
        sft_weight: Weight of the mean negative log-probability of the tokens.

    Returns:
        `KDOutput`.

    Raises:
        ValueError: Divergences that are not (B,), a number that is not finite or out of range.

    Example:
        >>> chosen = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([1, 3]))
        >>> vanilla_kd(chosen, torch.tensor([0.5, 1.5]), sft_weight=0.5).loss.item()
        1.5
    """
    divergence = token_mean(divergences, chosen.lengths)
    nll_loss = -token_mean(chosen.likelihoods(), chosen.lengths)
    loss = weight * divergence
    if sft_weight:
        loss = loss + sft_weight * nll_loss
    return KDOutput(loss, chosen.likelihoods().detach(), divergence.detach(), nll_loss.detach())


@unpaired_loss
def gkd(
    chosen: Responses,
    divergences: Tensor,
    *,
    weight: NonNegative = 1.0,
    sft_weight: NonNegative = 0.0,
) -> KDOutput:
    r"""Generalized Knowledge Distillation: any divergence, on anybody's responses.

    .. math:: L = \frac{1}{\sum |y|} \sum_{y} \sum_t \left(w \, D(p(\cdot | s_t),
              \pi(\cdot | s_t)) - \lambda \log \pi(y_t)\right)

    `GKD <https://arxiv.org/abs/2306.13649>`_. With a probability (0.5 in TRL) its batches are
    written by the student, with no gradient through that, and else come from a dataset. Its
    divergence is a Jensen-Shannon one, of which TRL's default weighs the teacher with 0.5;
    DistiLLM's code writes the student's weight in its place, 0.9, and that of DistiLLM-2 the
    teacher's, 0.9. TRL's ``temperature`` is of sampling alone.

    Args:
        chosen: Sums over the B responses that are trained on, whoever wrote them, from
            `fastpref.sum_responses`.
        divergences: (B,) sums over each response of the divergence between teacher and student,
            nats: `fastpref.sum_responses` of `fastpref.linear_divergence`, whose ``kind`` and
            ``beta`` say which.
        weight: Weight of the mean divergence.
        sft_weight: Weight of the mean negative log-probability of the tokens.

    Returns:
        `KDOutput`.

    Raises:
        ValueError: Divergences that are not (B,), a number that is not finite or out of range.

    Example:
        >>> sampled = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([1, 3]))
        >>> gkd(sampled, torch.tensor([0.5, 1.5])).loss.item()
        0.5
    """
    return vanilla_kd(chosen, divergences, weight=weight, sft_weight=sft_weight)


@pair_loss
def dckd(
    responses: Responses,
    divergences: Tensor,
    *,
    chosen_weight: NonNegative = 0.1,
    rejected_weight: NonNegative = 0.1,
    sft_weight: NonNegative = 1.0,
) -> DCKDOutput:
    r"""Dual-Constrained Knowledge Distillation: an aligned teacher, on winners and losers.

    .. math:: L = \frac{1}{\sum |y_w|} \sum \left(-\log \pi(y_w) + a K(y_w)\right)
              + \frac{b}{\sum |y_l|} \sum K(y_l), \qquad
              K(y) = \sum_t KL(p(\cdot | s_t) \, \| \, \pi(\cdot | s_t))

    `DCKD <https://arxiv.org/abs/2502.17927>`_; :math:`p` is a teacher trained with DPO, and the
    weights are the released ones. That code stores the teacher's 50 largest probabilities and one
    number for the rest, takes the KL of these 51 in the logits' own dtype, and cuts gradients of
    probabilities below 1e-7; here it is of the whole vocabulary.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        divergences: (2B,) sums over each response of the forward KL from the teacher to the
            student, nats: `fastpref.sum_responses` of `fastpref.linear_divergence`.
        chosen_weight: Weight of the mean divergence on chosen responses.
        rejected_weight: Weight of the mean divergence on rejected responses.
        sft_weight: Weight of the mean negative log-probability of the chosen tokens.

    Returns:
        `DCKDOutput`.

    Raises:
        ValueError: Divergences that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> round(dckd(responses, torch.tensor([1.0, 4.0])).loss.item(), 4)
        1.75
    """
    halves_of = zip(divergences.chunk(2), responses.lengths.chunk(2), strict=True)
    of_chosen, of_rejected = (token_mean(sums, lengths) for sums, lengths in halves_of)
    nll_loss = responses.chosen_nll()
    return DCKDOutput(
        sft_weight * nll_loss + chosen_weight * of_chosen + rejected_weight * of_rejected,
        *halves(responses.likelihoods()),
        chosen_divergence=of_chosen.detach(),
        rejected_divergence=of_rejected.detach(),
        nll_loss=nll_loss.detach(),
    )
