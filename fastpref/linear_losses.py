"""Losses from hidden states in one call: log-probabilities, sums over responses, and the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import losses
from fastpref.checks import check_labels
from fastpref.losses.drdo import DRDOOutput
from fastpref.losses.pairs import LossOutput
from fastpref.ops import Head, linear_logps
from fastpref.responses import Tokens, check_token_weights
from fastpref.sequences import check_pairs


def tvkd_loss(
    hidden: Tensor,
    head: Head | Tensor,
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
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int | None = None,
) -> LossOutput:
    r"""Preference loss with the teacher's value as potential-based reward shaping, without logits.

    .. math:: L = -\log \sigma(m_w - m_l), \qquad
              m = \beta \sum_t \log \pi_\theta(a_t | s_t) - \alpha \sum_t \psi(s_t, a_t)

    `TVKD <https://arxiv.org/abs/2509.16965>`_ (Teacher Value-based Knowledge Distillation, NeurIPS
    2025): `fastpref.losses.tvkd` of `linear_logps`, summed by `sum_responses`.

    Args:
        hidden: (2B, T, H) the student's hidden states, chosen rows first, or packed (N, H);
            float64, float32, float16 or bfloat16.
        head: The student's `Head`, or its weight (V, H).
        labels: (2B, T) integers, already shifted: the token that each hidden state predicts,
            ``ignore_index`` outside the response; or packed (N,).
        shaping: (2B,) :math:`\sum_t \psi`, from `teacher_shaping` or `shaping_from_values`.
        beta: As in `fastpref.losses.tvkd`, like the next four.
        alpha: Weight of the shaping.
        ref_logps: (2B,) of a reference model, or None.
        length_normalize: Divide the whole of :math:`m` by the number of response tokens.
        label_smoothing: In [0, 0.5].
        token_weights: (2B, T) or packed (N,), multiplied with the log-probabilities in :math:`m`.
        sft_weight: Weight of the mean negative log-probability of the batch's chosen tokens.
        cu_seqlens: (2B + 1,) integers, the boundaries of packed sequences, chosen ones first.
        temperature: As in `linear_logps`, like all that follows.
        ignore_index: The label of positions outside the response.
        compact: Project labelled rows only.
        scratch_bytes: Where the head trains, the most bytes to keep for backward; None chooses.

    Returns:
        `LossOutput`. A response without labels counts as zero log-probability.

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
    tokens = _tokens(
        hidden, head, labels, cu_seqlens, token_weights, temperature=temperature,
        ignore_index=ignore_index, compact=compact, scratch_bytes=scratch_bytes,
    )  # fmt: skip
    return losses.tvkd(
        tokens,
        shaping,
        beta=beta,
        alpha=alpha,
        ref_logps=ref_logps,
        length_normalize=length_normalize,
        label_smoothing=label_smoothing,
        sft_weight=sft_weight,
    )


def drdo_loss(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    student_rewards: Tensor,
    oracle_rewards: Tensor,
    *,
    alpha: float = 0.1,
    gamma: float = 2.0,
    length_normalize: bool = False,
    detach_focal: bool = False,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int | None = None,
) -> DRDOOutput:
    r"""Reward distillation with a focal log-odds preference term, without the logits.

    .. math:: L = (\Delta r^* - \Delta \hat r)^2
              - \alpha (1 - p_w)^\gamma \log \frac{\pi_\theta(y_w)}{1 - \pi_\theta(y_l)},
              \qquad p_w = \sigma(z_w - z_l), \quad z = \log \pi_\theta(y | x)

    `DRDO <https://arxiv.org/abs/2410.08458>`_ (Direct Reward Distillation and policy-Optimization),
    equation 7: `fastpref.losses.drdo`, which says what its options mean, of `linear_logps`, summed
    by `sum_responses`.

    Args:
        hidden: As in `tvkd_loss`, like the next two.
        head: The student's `Head`, or its weight (V, H).
        labels: (2B, T) or packed (N,).
        student_rewards: (2B,) from `sequence_rewards`.
        oracle_rewards: (2B,) the oracle's rewards, in the same unit.
        alpha: Weight of the preference term.
        gamma: Exponent of the focal factor.
        length_normalize: Use mean log-probabilities per token instead of sums.
        detach_focal: Hold the focal factor constant in the backward pass.
        cu_seqlens: As in `tvkd_loss`, like all that follows.
        temperature: Divides the logits.
        ignore_index: The label of positions outside the response.
        compact: Project labelled rows only.
        scratch_bytes: Where the head trains, the most bytes to keep for backward; None chooses.

    Returns:
        `fastpref.losses.drdo.DRDOOutput`. A response without labels counts as zero log-probability.

    Raises:
        ValueError: As `tvkd_loss`.

    Example:
        >>> hidden = torch.randn(2, 3, 8, requires_grad=True)
        >>> weight = torch.randn(50, 8)
        >>> labels = torch.tensor([[4, 9, 2], [1, 3, -100]])
        >>> rewards = torch.zeros(2, requires_grad=True)
        >>> out = drdo_loss(hidden, weight, labels, rewards, torch.tensor([1.0, -1.0]))
        >>> out.loss.backward()
        >>> rewards.grad
        tensor([-4.,  4.])
    """
    tokens = _tokens(
        hidden, head, labels, cu_seqlens, None, temperature=temperature,
        ignore_index=ignore_index, compact=compact, scratch_bytes=scratch_bytes,
    )  # fmt: skip
    return losses.drdo(
        tokens,
        student_rewards,
        oracle_rewards,
        alpha=alpha,
        gamma=gamma,
        length_normalize=length_normalize,
        detach_focal=detach_focal,
    )


def _tokens(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    **options: Any,  # of `linear_logps`
) -> Tokens:
    check_labels(labels, hidden)
    ignore_index = options["ignore_index"]

    def pairs(*, read: bool) -> tuple[Tensor, Tensor | None]:
        return check_pairs(labels, cu_seqlens, ignore_index, read=read)

    # Wrong boundaries spoil the labels, so the host, which reads these, need not read both.
    reads_boundaries = options["compact"] and torch.compiler.is_compiling()
    checked, boundaries = pairs(read=reads_boundaries)
    check_token_weights(token_weights, checked)
    try:
        logps = linear_logps(hidden, head, checked, **options)
    except ValueError:
        pairs(read=True)  # says what is wrong with them, if it is they
        raise
    return Tokens(logps, checked != ignore_index, boundaries, token_weights)
