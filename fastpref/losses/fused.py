"""The pair kernels as differentiable operators: one launch for sums, losses and coefficients.

They compute what ``_tvkd_pairs`` and ``_drdo_pairs`` beside them compute in PyTorch. Each returns,
beside losses and sums, what every log-probability's gradient is a multiple of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.losses.pairs import SequenceSums
from fastpref.ops.backend import uses_triton
from fastpref.sequences import sequence_of_position


def runs_fused(logps: Tensor, constants: tuple[Tensor | None, ...]) -> bool:
    """Whether a pair kernel serves these log-probabilities: ``constants`` must want no gradient."""
    return uses_triton(logps) and not any(
        constant is not None and constant.requires_grad for constant in constants
    )


def fused_tvkd_pairs(
    logps: Tensor,  # (2B, T) or (N,)
    mask: Tensor,  # (2B, T) or (N,) bool
    offsets: Tensor,  # (2B + 1,)
    shaping: Tensor,  # (2B,)
    ref_logps: Tensor | None,  # (2B,)
    token_weights: Tensor | None,  # (2B, T) or (N,)
    beta: float,
    alpha: float,
    label_smoothing: float,
    length_normalize: bool,
) -> tuple[Tensor, SequenceSums]:
    """Losses (B,) of the pairs, and the sums they come from, in one launch."""
    losses, sums, lengths, _ = tvkd_pairs_op(
        logps.reshape(-1),
        mask.reshape(-1),
        offsets,
        shaping,
        ref_logps,
        None if token_weights is None else token_weights.reshape(-1),
        float(beta),
        float(alpha),
        float(label_smoothing),
        length_normalize,
    )
    return losses, SequenceSums(sums, lengths)


def fused_drdo_pairs(
    logps: Tensor,  # (2B, T) or (N,)
    mask: Tensor,  # (2B, T) or (N,) bool
    offsets: Tensor,  # (2B + 1,)
    student_rewards: Tensor,  # (2B,)
    oracle_rewards: Tensor,  # (2B,)
    alpha: float,
    gamma: float,
    length_normalize: bool,
    detach_focal: bool,
) -> tuple[Tensor, SequenceSums]:
    """Losses (B,) of the pairs, and the sums they come from, in one launch."""
    losses, sums, lengths, _, _ = drdo_pairs_op(
        logps.reshape(-1),
        mask.reshape(-1),
        offsets,
        student_rewards,
        oracle_rewards,
        float(alpha),
        float(gamma),
        length_normalize,
        detach_focal,
    )
    return losses, SequenceSums(sums, lengths)


@torch.library.custom_op("fastpref::tvkd_pairs", mutates_args=())
def tvkd_pairs_op(
    logps: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    offsets: Tensor,  # (2B + 1,)
    shaping: Tensor,  # (2B,)
    ref_logps: Tensor | None,  # (2B,)
    token_weights: Tensor | None,  # (N,)
    beta: float,
    alpha: float,
    label_smoothing: float,
    length_normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (B,), sums (2B,), lengths (2B,), and d loss / d logps (N,)."""
    from fastpref.kernels.tvkd_pairs import tvkd_pairs

    return tvkd_pairs(
        logps, mask, offsets, shaping, ref_logps, token_weights,
        beta=beta, alpha=alpha, label_smoothing=label_smoothing, length_normalize=length_normalize,
    )  # fmt: skip


@torch.library.custom_op("fastpref::drdo_pairs", mutates_args=())
def drdo_pairs_op(
    logps: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    offsets: Tensor,  # (2B + 1,)
    student_rewards: Tensor,  # (2B,)
    oracle_rewards: Tensor,  # (2B,)
    alpha: float,
    gamma: float,
    length_normalize: bool,
    detach_focal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses (B,), sums (2B,), lengths (2B,), d loss / d logps (N,), d loss / d reward gap (B,)."""
    from fastpref.kernels.drdo_pairs import drdo_pairs

    return drdo_pairs(
        logps, mask, offsets, student_rewards, oracle_rewards,
        alpha=alpha, gamma=gamma, length_normalize=length_normalize, detach_focal=detach_focal,
    )  # fmt: skip


@tvkd_pairs_op.register_fake
def _(logps: Tensor, mask: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _shared_outputs(logps, offsets)


@drdo_pairs_op.register_fake
def _(logps: Tensor, mask: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *_shared_outputs(logps, offsets), logps.new_empty(offsets.shape[0] // 2)


def _shared_outputs(logps: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    sequences = offsets.shape[0] - 1
    return (
        logps.new_empty(sequences // 2),
        logps.new_empty(sequences),
        logps.new_empty(sequences, dtype=torch.int64),
        torch.empty_like(logps),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, mask, offsets, *_ = inputs
    _, _, lengths, *coefficients = output
    ctx.mark_non_differentiable(lengths, *coefficients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, offsets, *coefficients)


def _logps_gradient(
    losses_gradient: Tensor | None,  # (B,)
    sums_gradient: Tensor | None,  # (2B,)
    mask: Tensor,  # (N,)
    offsets: Tensor,  # (2B + 1,)
    coefficients: Tensor,  # (N,)
) -> Tensor:
    """Each token's share in the gradients of its pair's loss and of its sequence's sum: (N,)."""
    sequence = sequence_of_position(coefficients.shape[0], offsets)
    gradient = torch.zeros_like(coefficients)
    if losses_gradient is not None:
        gradient = losses_gradient.repeat(2)[sequence] * coefficients
    if sums_gradient is not None:
        gradient = gradient + torch.where(mask, sums_gradient[sequence], 0)
    return gradient


def _tvkd_backward(
    ctx: Any, losses_gradient: Tensor | None, sums_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    return _logps_gradient(losses_gradient, sums_gradient, *ctx.saved_tensors), *(None,) * 9


def _drdo_backward(
    ctx: Any, losses_gradient: Tensor | None, sums_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *shared, reward_coefficients = ctx.saved_tensors
    student_gradient = None
    if losses_gradient is not None:
        chosen = losses_gradient * reward_coefficients
        student_gradient = torch.cat((chosen, -chosen))
    return (
        _logps_gradient(losses_gradient, sums_gradient, *shared),
        None,
        None,
        student_gradient,
        *(None,) * 5,
    )


tvkd_pairs_op.register_autograd(_tvkd_backward, setup_context=_setup_context)
drdo_pairs_op.register_autograd(_drdo_backward, setup_context=_setup_context)
