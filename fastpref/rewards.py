"""Rewards that a linear head reads off the end of a response."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.checks import check_device, check_floating, refuse
from fastpref.ops.backend import statistics_dtype
from fastpref.sequences import check_pairs, check_states, labels_of_states, last_position


def sequence_rewards(
    hidden: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""The scalar reward of every response, read by a linear head after its last token.

    .. math:: \hat r(y) = w \cdot h_T + b

    DRDO (Direct Reward Distillation and policy-Optimization). Differentiable.

    Args:
        hidden: (2B, T + 1, H) hidden states *unshifted*, the one after the last token included, or
            packed (N, H); floating point.
        labels: (2B, T) integers, already shifted, or packed (N,).
        head_weight: (1, H), as ``torch.nn.Linear(H, 1)`` has it, or (H,).
        head_bias: (1,), () or None.
        cu_seqlens: (2B + 1,) integers, the boundaries of packed sequences, chosen ones first; the
            host reads them.
        ignore_index: The label of positions outside the response.

    Returns:
        (2B,) rewards, float32 (float64 for float64 inputs); 0 for a sequence without labels.

    Raises:
        ValueError: ``hidden`` without the extra position, rows that are not pairs, shapes, devices
            or dtypes that do not fit.

    Example:
        >>> hidden, head = torch.randn(2, 4, 8), torch.nn.Linear(8, 1)
        >>> labels = torch.tensor([[5, 6, 7], [5, 6, -100]])
        >>> sequence_rewards(hidden, labels, head.weight, head.bias).shape
        torch.Size([2])
    """
    labels, cu_seqlens = check_pairs(labels, cu_seqlens, ignore_index)
    check_states("hidden", hidden, labels, cu_seqlens, vectors=True)
    check_floating("head_weight", head_weight)
    check_device("head_weight", head_weight, "hidden", hidden)
    width = hidden.shape[-1]
    if tuple(head_weight.shape) not in ((1, width), (width,)):
        refuse("head_weight", f"shape (1, {width}) or ({width},)", tuple(head_weight.shape))
    mask = labels_of_states(labels, cu_seqlens, ignore_index) != ignore_index
    last = last_position(mask, cu_seqlens)
    # There is one after it: the last label of a sequence is never that of a token.
    if cu_seqlens is None:
        states = hidden[torch.arange(hidden.shape[0], device=hidden.device), last + 1]
    else:
        states = hidden[last + 1]
    # Before the product: what a sequence without labels holds must not reach the head's gradient.
    states = torch.where((last >= 0).unsqueeze(1), states, 0)
    dtype = statistics_dtype(hidden.dtype)
    rewards = (states.to(dtype) * head_weight.reshape(-1).to(dtype)).sum(-1)
    if head_bias is not None:
        check_floating("head_bias", head_bias)
        check_device("head_bias", head_bias, "hidden", hidden)
        if head_bias.numel() != 1:
            refuse("head_bias", "shape (1,) or ()", tuple(head_bias.shape))
        rewards = rewards + head_bias.reshape(()).to(dtype)
    return torch.where(last >= 0, rewards, 0)
