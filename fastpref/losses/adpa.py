"""ADPA: the advantage of an aligned teacher, in expectation over the student's next token."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from fastpref.checks import NonNegative
from fastpref.losses.pairs import Shape, halves, pair_loss
from fastpref.responses import Responses, token_mean

OfRejected = Annotated[
    Tensor,
    Shape("(B,), one number per rejected response", lambda sizes, count: sizes == (count // 2,)),
]


class ADPAOutput(NamedTuple):
    """What `adpa` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over tokens, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    rejected_logps: Tensor  #: (B,)
    rejected_advantage: Tensor  #: () mean over tokens, nats
    nll_loss: Tensor  #: () mean negative log-probability of the chosen tokens, nats


@pair_loss
def adpa(
    responses: Responses,
    advantages: OfRejected,
    *,
    weight: NonNegative = 1.6,
    sft_weight: NonNegative = 1.0,
) -> ADPAOutput:
    r"""Advantage-Guided Distillation: raise what the aligned teacher prefers to the one before it.

    .. math:: L = -\frac{\sum \log \pi(y_w)}{\sum |y_w|} - \frac{w}{\sum |y_l|} \sum \sum_t
              E_{a \sim \pi(\cdot | s_t)}[A(s_t, a)], \qquad
              A = \log p_{dpo}(a | s_t) - \log p_{ref}(a | s_t)

    `ADPA <https://arxiv.org/abs/2502.17927>`_; :math:`p_{dpo}` is a teacher after DPO,
    :math:`p_{ref}` the same before it. :math:`s_t` runs along responses that the student wrote
    before training, in the place of the rejected ones. The weights are the released ones. That the
    paper's :math:`A` has a factor, which ``weight`` absorbs here, is from memory.

    The released code is another loss. It has :math:`A` for the aligned teacher's 50 likeliest
    tokens only and 0 for all others, takes that teacher's smallest stored probability where the
    other teacher's is missing, and clamps :math:`A` to 1e-8 and 1, so that no token is punished.
    `linear_topk_expectation` of such numbers is what it trains; ``clip=(0, 1)`` of
    `linear_divergence` clamps over the whole vocabulary.

    Args:
        responses: Sums over 2B responses, chosen ones and then the student's own, from
            `fastpref.sum_responses`.
        advantages: (B,) sums of the expected advantages over each of the student's own
            responses, nats: `fastpref.sum_responses` of `fastpref.linear_divergence` with
            ``kind="advantage"``.
        weight: Weight of the mean advantage.
        sft_weight: Weight of the mean negative log-probability of the chosen tokens.

    Returns:
        `ADPAOutput`.

    Raises:
        ValueError: Advantages that are not (B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> round(adpa(responses, torch.tensor([0.5])).loss.item(), 4)
        1.1
    """
    _, lengths = responses.lengths.chunk(2)
    advantage = token_mean(advantages, lengths)
    nll_loss = responses.chosen_nll()
    return ADPAOutput(
        sft_weight * nll_loss - weight * advantage,
        *halves(responses.likelihoods()),
        rejected_advantage=advantage.detach(),
        nll_loss=nll_loss.detach(),
    )
