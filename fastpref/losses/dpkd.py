"""DPKD: DPO with the teacher as the reference, of its choices against the student's."""

from __future__ import annotations

from torch import Tensor

from fastpref.checks import NonNegative, Positive
from fastpref.losses.kd import KDOutput, vanilla_kd
from fastpref.losses.pairs import (
    LossOutput,
    margins,
    pair_loss,
    pair_output,
    preference_losses,
    unpaired_loss,
)
from fastpref.responses import Responses


@pair_loss
def dpkd(
    responses: Responses,
    teacher_logps: Tensor,
    *,
    beta: Positive = 0.1,
    length_normalize: bool = True,
) -> LossOutput:
    r"""Direct Preference Knowledge Distillation: the teacher's responses over the student's own.

    .. math:: L = -\log \sigma\left(\frac{\beta}{|y_t|} \log \frac{\pi(y_t)}{p(y_t)}
              - \frac{\beta}{|y_s|} \log \frac{\pi(y_s)}{p(y_s)}\right)

    `DPKD <https://arxiv.org/abs/2406.19774>`_, between a response :math:`y_t` of the teacher
    :math:`p` and one of the student, :math:`y_s`. The paper's abstract confirms the roles of
    teacher and student; this formula and its means per token are from memory. DistiLLM-2 has it,
    too, as its ``dpkd``.

    The released code is another loss, `dpkd_token`. Its ``beta`` is the default here.

    Args:
        responses: Sums over 2B responses, the teacher's and then the student's, from
            `fastpref.sum_responses`.
        teacher_logps: (2B,) summed log-probabilities under the teacher.
        beta: Scale of the log-ratios.
        length_normalize: Whether log-ratios are means per token instead of sums.

    Returns:
        `LossOutput`; rewards are ``beta * (logps - teacher_logps)``, per token under
        ``length_normalize``.

    Raises:
        ValueError: Tensors that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> round(dpkd(responses, torch.tensor([-4.0, -4.0]), beta=1.0).loss.item(), 4)
        0.3133
    """
    ratios = responses.logps - teacher_logps
    rewards = beta * (responses.likelihoods() - teacher_logps)
    if length_normalize:
        ratios, rewards = responses.per_token(ratios), responses.per_token(rewards)
    losses = preference_losses(beta * margins(ratios))
    return pair_output(losses, responses, rewards)


@unpaired_loss
def dpkd_token(
    chosen: Responses,
    divergences: Tensor,
    *,
    weight: NonNegative = 0.5,
    sft_weight: NonNegative = 0.5,
) -> KDOutput:
    r"""Direct Preference Knowledge Distillation as released: a preference at every token.

    .. math:: L = \frac{1}{\sum |y|} \sum_{y} \sum_t \left(-w \log \sigma\left(\beta
              \log \frac{\pi(a_t)}{\pi(b_t)} - \beta \log \frac{p(a_t)}{p(b_t)}\right)
              - \lambda \log \pi(y_t)\right), \quad
              a_t = \arg\max p, \quad b_t = \arg\max \pi

    The code of `DPKD <https://arxiv.org/abs/2406.19774>`_ trains this at every position of the
    dataset's responses, where the teacher's :math:`p` finds one token the likeliest and the student
    another; its paper has `dpkd`, on responses that both write. The formula, the mean over all
    tokens, the weights and a :math:`\beta` of 0.1 are read from that code. There log-softmaxes are
    rounded to bfloat16 before the likeliest tokens are looked for, and half of the loss on a
    pretraining corpus is added; not here. Which of its results come from this loss is not verified.

    Where both find the same token likeliest, the preference is :math:`\log 2` without a gradient.

    Args:
        chosen: Sums over B responses, from `fastpref.sum_responses`.
        divergences: (B,) sums over each response of the preference losses of its tokens, nats:
            `fastpref.sum_responses` of `fastpref.linear_token_preference`, which takes ``beta``.
        weight: Weight of the mean preference loss of the tokens.
        sft_weight: Weight of the mean negative log-probability of the tokens.

    Returns:
        `KDOutput`, the mean preference loss in the place of a divergence.

    Raises:
        ValueError: Preference losses that are not (B,), a number that is not finite or out of
            range.

    Example:
        >>> chosen = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([1, 3]))
        >>> dpkd_token(chosen, torch.tensor([0.5, 1.5])).loss.item()
        1.25
    """
    return vanilla_kd(chosen, divergences, weight=weight, sft_weight=sft_weight)
