"""TVKD: a DPO-like loss shaped by the values of a preference-tuned teacher."""

from __future__ import annotations

from torch import Tensor

from fastpref.checks import NonNegative, Positive, Smoothing
from fastpref.losses.pairs import LossOutput, margins, pair_loss, pair_output, preference_losses
from fastpref.responses import Responses


@pair_loss
def tvkd(
    responses: Responses,
    shaping: Tensor,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
    ref_logps: Tensor | None = None,
    length_normalize: bool = False,
    label_smoothing: Smoothing = 0.0,
    sft_weight: NonNegative = 0.0,
) -> LossOutput:
    r"""Preference loss with a teacher's value as potential-based reward shaping.

    .. math:: L = -\log \sigma(m_w - m_l), \qquad
              m = \beta \sum_t \log \pi_\theta(a_t | s_t) - \alpha \sum_t \psi(s_t, a_t)

    `TVKD <https://arxiv.org/abs/2509.16965>`_ (Teacher Value-based Knowledge Distillation, NeurIPS
    2025). ``alpha=0`` is the reference-free DPO loss, and with ``ref_logps`` DPO itself.

    Args:
        responses: Sums over 2B responses, chosen ones first, from `fastpref.sum_responses`.
        shaping: (2B,) :math:`\sum_t \psi`, from `fastpref.teacher_shaping`.
        beta: Scale of the log-probabilities.
        alpha: Weight of the teacher's shaping; 0 does not read it, and is DPO.
        ref_logps: (2B,) summed log-probabilities of a reference model, subtracted from the
            student's; None for none.
        length_normalize: Whether to divide the whole of m by the number of response tokens.
        label_smoothing: Probability of a flipped label, as in cDPO.
        sft_weight: Weight of the mean negative log-probability of the chosen tokens.

    Returns:
        `LossOutput`; rewards are ``beta * (logps - ref_logps)``, per token under
        ``length_normalize``.

    Raises:
        ValueError: Tensors that are not (2B,), a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> round(tvkd(responses, torch.tensor([1.0, 0.0])).loss.item(), 4)
        1.1711
    """
    reference = 0.0 if ref_logps is None else ref_logps
    values = beta * (responses.logps - reference)
    if alpha:
        values = values - alpha * shaping
    rewards = beta * (responses.likelihoods() - reference)
    if length_normalize:
        values, rewards = responses.per_token(values), responses.per_token(rewards)
    losses = preference_losses(margins(values), label_smoothing)
    return pair_output(losses, responses, rewards, sft_weight)
