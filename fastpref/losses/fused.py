"""TVKD and DRDO on GPUs: sums, losses and coefficients of all pairs in one launch.

`FUSED` computes what the methods of the same names compute in PyTorch. The operator returns, beside
losses and sums, the derivative of each pair's loss by every log-probability: backward multiplies it
by the incoming gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref.derivatives import first_derivative_only, refuse_transforms
from fastpref.losses.drdo import DRDOOutput, drdo_output
from fastpref.losses.pairs import LossOutput, pair_output
from fastpref.responses import Responses, Tokens
from fastpref.sequences import offsets, sequence_of_position


def fused_tvkd(
    tokens: Tokens, shaping: Tensor, *, ref_logps: Tensor | None, beta: float, alpha: float,
    length_normalize: bool, label_smoothing: float, sft_weight: float,
) -> LossOutput:  # fmt: skip
    """`fastpref.losses.tvkd`."""
    losses, _, responses = _pair_losses(
        "tvkd", tokens, shaping if alpha else None, ref_logps, beta, alpha, label_smoothing,
        length_normalize=length_normalize,
    )  # fmt: skip
    rewards = beta * (responses.logps if ref_logps is None else responses.logps - ref_logps)
    if length_normalize:
        rewards = responses.per_token(rewards)
    return pair_output(losses, responses, rewards, sft_weight)


def fused_drdo(
    tokens: Tokens, student_rewards: Tensor, oracle_rewards: Tensor, *, alpha: float, gamma: float,
    length_normalize: bool, detach_focal: bool,
) -> DRDOOutput:  # fmt: skip
    """`fastpref.losses.drdo`."""
    losses, terms, responses = _pair_losses(
        "drdo", tokens, student_rewards, oracle_rewards, alpha, gamma, 0.0 if detach_focal else 1.0,
        length_normalize=length_normalize,
    )  # fmt: skip
    reward_losses, preference_losses = terms
    return drdo_output(losses, reward_losses, preference_losses, responses, student_rewards)


FUSED: dict[str, Callable[..., Any]] = {"tvkd": fused_tvkd, "drdo": fused_drdo}


def _pair_losses(
    loss: str,
    tokens: Tokens,
    x: Tensor | None,  # (2B,)
    y: Tensor | None,  # (2B,)
    *options: float,
    length_normalize: bool,
) -> tuple[Tensor, Tensor, Responses]:
    """Losses (B,), their terms (2, B), and the sums without weights."""
    refuse_transforms(f"fastpref.losses.{loss} (on GPUs)", (*tokens, x, y))
    losses, terms, sums, lengths, *_ = pair_losses_op(
        loss,
        tokens.logps.reshape(-1),
        tokens.mask.reshape(-1),
        offsets(tokens.mask, tokens.cu_seqlens),
        None if tokens.token_weights is None else tokens.token_weights.reshape(-1),
        x,
        y,
        *options,
        length_normalize,
    )
    return losses, terms, Responses(sums, lengths)


@torch.library.custom_op("fastpref::pair_losses", mutates_args=())
def pair_losses_op(
    loss: str,
    logps: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    offsets: Tensor,  # (2B + 1,)
    token_weights: Tensor | None,  # (N,)
    x: Tensor | None,  # (2B,)
    y: Tensor | None,  # (2B,)
    a: float,
    b: float,
    c: float,
    length_normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses (B,) and the outputs of `fastpref.kernels.pair_losses.pair_losses`."""
    from fastpref.kernels.pair_losses import pair_losses

    found = pair_losses(
        loss, logps, mask, offsets, token_weights, x, y, a, b, c, length_normalize=length_normalize
    )
    return found.terms.sum(0), *found


@pair_losses_op.register_fake
def _(loss: str, logps: Tensor, mask: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    sequences = offsets.shape[0] - 1
    return (
        logps.new_empty(sequences // 2),
        logps.new_empty(2, sequences // 2),
        logps.new_empty(sequences),
        logps.new_empty(sequences, dtype=torch.int64),
        torch.empty_like(logps),
        logps.new_empty(sequences),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logps, mask, offsets, _, x, *_ = inputs
    _, terms, _, lengths, by_logps, by_x = output
    ctx.mark_non_differentiable(terms, lengths, by_logps, by_x)
    ctx.set_materialize_grads(False)
    # The last two are what the derivatives depend on, for `first_derivative_only`.
    ctx.save_for_backward(mask, offsets, by_logps, by_x, logps, x)


@first_derivative_only("fastpref.losses.tvkd, drdo (on GPUs)")
def _backward(
    ctx: Any, losses_gradient: Tensor | None, _terms: None, sums_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    mask, offsets, by_logps, by_x, *_ = ctx.saved_tensors
    sequence = sequence_of_position(by_logps.shape[0], offsets)
    gradient, x_gradient = torch.zeros_like(by_logps), None
    if losses_gradient is not None:
        of_sequences = losses_gradient.repeat(2)
        gradient = of_sequences[sequence] * by_logps
        x_gradient = of_sequences * by_x if ctx.needs_input_grad[5] else None
    if sums_gradient is not None:
        gradient = gradient + torch.where(mask, sums_gradient[sequence], 0)
    return None, gradient, None, None, None, x_gradient, *(None,) * 5


pair_losses_op.register_autograd(_backward, setup_context=_setup_context)
