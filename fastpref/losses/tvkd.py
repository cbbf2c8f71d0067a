"""TVKD: a DPO-like loss shaped by the values of a preference-tuned teacher."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from fastpref.checks import (
    check_device,
    check_flag,
    check_floating,
    check_labels,
    check_number,
    check_shape,
)
from fastpref.losses.fused import fused_tvkd_pairs, runs_fused
from fastpref.losses.pairs import SequenceSums, preference_losses, sequence_sums
from fastpref.ops import HeadOptions, linear_logps
from fastpref.ops.head import check_options
from fastpref.sequences import check_pairs, check_per_sequence, offsets, sequence_sum


class TVKDOutput(NamedTuple):
    """What `tvkd_loss` returns; everything but ``loss`` is detached."""

    loss: Tensor  # () mean over pairs, differentiable
    chosen_logps: Tensor  # (B,) summed log-probabilities, nats
    rejected_logps: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,) beta * (logps - ref_logps), per token under length_normalize
    rejected_rewards: Tensor  # (B,)
    nll_loss: Tensor  # () mean negative log-probability of the chosen tokens, nats


def tvkd_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    shaping: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    ref_logps: Tensor | None = None,
    length_normalize: bool = False,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
    sft_weight: float = 0.0,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    **head_options: Unpack[HeadOptions],
) -> TVKDOutput:
    r"""Preference loss with the teacher's value as potential-based reward shaping, without logits.

    .. math:: L = -\log \sigma(m_w - m_l), \qquad
              m = \beta \sum_t \log \pi_\theta(a_t | s_t) - \alpha \sum_t \psi(s_t, a_t)

    TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025). ``alpha=0`` is the
    reference-free DPO loss, and with ``ref_logps`` DPO itself.

    Args:
        hidden: (2B, T, H) the student's hidden states, chosen rows first, or packed (N, H);
            float64, float32, float16 or bfloat16.
        weight: (V, H) the student's head, in the dtype of ``hidden`` (autocast casts both).
        labels: (2B, T) integers, already shifted: the token that each hidden state predicts,
            ``ignore_index`` outside the response; or packed (N,).
        shaping: (2B,) :math:`\sum_t \psi`, from `teacher_shaping` or `shaping_from_values`.
        beta: Scale of the log-probabilities (> 0).
        alpha: Weight of the shaping, which at 0 is not read.
        ref_logps: (2B,) summed log-probabilities of a reference model, subtracted from the
            student's; None for none.
        length_normalize: Divide the whole of :math:`m` by the number of response tokens.
        label_smoothing: :math:`\epsilon` in [0, 0.5] of cDPO:
            :math:`-(1-\epsilon)\log\sigma(d) - \epsilon\log\sigma(-d)`.
        token_weights: (2B, T) or packed (N,), multiplied with the log-probabilities in :math:`m`.
        sft_weight: Weight (>= 0) of the mean negative log-probability of the batch's chosen tokens.
        cu_seqlens: (2B + 1,) integers, the boundaries of packed sequences, chosen ones first.
        ignore_index: The label of positions outside the response.
        **head_options: ``bias``, ``temperature``, ``logit_scale``, ``softcap``, ``compact`` and
            ``scratch_bytes``, as in `linear_logps`.

    Returns:
        `TVKDOutput`. A response without labels counts as zero log-probability.

    Raises:
        ValueError: Rows that are not pairs, shapes, devices or dtypes that do not fit, labels
            outside the vocabulary, wrong ``cu_seqlens``, a number not finite or out of range.

    Example:
        >>> hidden = torch.randn(2, 3, 8, requires_grad=True)
        >>> weight = torch.randn(50, 8)
        >>> labels = torch.tensor([[4, 9, 2], [1, 3, -100]])
        >>> out = tvkd_loss(hidden, weight, labels, shaping=torch.tensor([1.5, 0.5]))
        >>> out.loss.backward()
        >>> hidden.grad.shape, out.chosen_logps.shape
        (torch.Size([2, 3, 8]), torch.Size([1]))
    """
    check_options("tvkd_loss", head_options)
    check_labels(labels, hidden)
    labels, cu_seqlens, sequences = check_pairs(
        labels, cu_seqlens, ignore_index, read=head_options.get("compact", True)
    )
    beta = check_number("beta", beta, above=0)
    alpha = check_number("alpha", alpha)
    label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, at_most=0.5)
    sft_weight = check_number("sft_weight", sft_weight, at_least=0)
    check_flag("length_normalize", length_normalize)
    check_per_sequence("shaping", shaping, sequences, labels)
    if ref_logps is not None:
        check_per_sequence("ref_logps", ref_logps, sequences, labels)
    if token_weights is not None:
        check_floating("token_weights", token_weights)
        check_shape("token_weights", token_weights, labels.shape, "like labels")
        check_device("token_weights", token_weights, "labels", labels)

    logps = linear_logps(hidden, weight, labels, ignore_index=ignore_index, **head_options)
    mask = labels != ignore_index
    shaping = shaping.to(logps.dtype)
    ref_logps = None if ref_logps is None else ref_logps.to(logps.dtype)
    token_weights = None if token_weights is None else token_weights.to(logps.dtype)
    if runs_fused(logps, constants=(shaping, ref_logps, token_weights)):
        losses, sums = fused_tvkd_pairs(
            logps, mask, offsets(labels, cu_seqlens), shaping, ref_logps, token_weights,
            beta, alpha, label_smoothing, length_normalize,
        )  # fmt: skip
    else:
        losses, sums = _tvkd_pairs(
            logps, mask, cu_seqlens, shaping, ref_logps, token_weights,
            beta, alpha, label_smoothing, length_normalize,
        )  # fmt: skip

    nll_loss = sums.chosen_nll()
    loss = losses.mean()
    if sft_weight:
        loss = loss + sft_weight * nll_loss
    rewards = beta * (sums.logps if ref_logps is None else sums.logps - ref_logps).detach()
    if length_normalize:
        rewards = sums.per_token(rewards)
    chosen_logps, rejected_logps = sums.logps.detach().chunk(2)
    chosen_rewards, rejected_rewards = rewards.chunk(2)
    return TVKDOutput(
        loss, chosen_logps, rejected_logps, chosen_rewards, rejected_rewards, nll_loss.detach()
    )


def _tvkd_pairs(
    logps: Tensor,  # (2B, T) or (N,)
    mask: Tensor,  # (2B, T) or (N,) bool
    cu_seqlens: Tensor | None,  # (2B + 1,)
    shaping: Tensor,  # (2B,)
    ref_logps: Tensor | None,  # (2B,)
    token_weights: Tensor | None,  # (2B, T) or (N,)
    beta: float,
    alpha: float,
    label_smoothing: float,
    length_normalize: bool,
) -> tuple[Tensor, SequenceSums]:
    """The formula, in PyTorch: losses (B,) of the pairs, and the sums they come from."""
    sums = sequence_sums(logps, mask, cu_seqlens)
    weighted = sums.logps
    if token_weights is not None:
        # Masks the weights, not the products: an ignored token's NaN would be in the gradients.
        weighted = sequence_sum(torch.where(mask, token_weights, 0) * logps, cu_seqlens)
    if ref_logps is not None:
        weighted = weighted - ref_logps
    values = beta * weighted
    if alpha:
        values = values - alpha * shaping
    if length_normalize:
        values = sums.per_token(values)
    chosen, rejected = values.chunk(2)
    return preference_losses(chosen - rejected, label_smoothing), sums
