"""DPKD: DPO with the teacher as the reference, of its responses against the student's."""

from __future__ import annotations

from torch import Tensor

from fastpref.checks import Positive
from fastpref.losses.pairs import LossOutput, margins, pair_loss, pair_output, preference_losses
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

    The released code is another loss: at every position of the ground truth it compares the
    teacher's most likely token with the student's, in bfloat16, beside likelihood terms. No
    response is sampled. Its ``beta`` is the default here.

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
