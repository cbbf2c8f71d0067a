"""The loss of every pair, the sums behind it and its gradients, in one launch.

The kernel is handed the loss as a function of a few scalars: what `tvkd_pair` and `drdo_pair` are.
Such a function takes, of the chosen (w) and the rejected response (l) of a pair,

    z, n      sum of log-probabilities, and what the loss divides it by: the length, or 1
    x, y      two numbers per response, 0 where there are none
    a, b, c   the options of the loss

and returns the two terms of the loss and the derivatives of their sum by z_w, z_l, x_w and x_l.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ELEMENT_WARPS, ELEMENTS, compile_options, on
from .numerics import expm1_negative, log1mexp, logsigmoid


class PairLosses(NamedTuple):
    """What `pair_losses` computes, float32 but for the lengths."""

    terms: Tensor  # (2, B) whose sum is the loss of each pair
    logps_sums: Tensor  # (2B,) without the tokens' weights
    lengths: Tensor  # (2B,) int64
    by_logps: Tensor  # (N,) derivatives of the losses
    by_x: Tensor  # (2B,)


def pair_losses(
    loss: str,  # a key of LOSSES
    logps: Tensor,  # (N,) float32
    mask: Tensor,  # (N,) bool
    offsets: Tensor,  # (2B + 1,) int32 or int64
    token_weights: Tensor | None,  # (N,) float32
    x: Tensor | None,  # (2B,) float32
    y: Tensor | None,  # (2B,) float32
    a: float,
    b: float,
    c: float,
    *,
    length_normalize: bool,
) -> PairLosses:
    """Compute the losses of pairs of sequences, and their derivatives.

    Sequence `s` owns tokens `offsets[s]` to `offsets[s + 1]`; pair `p` is sequences `p` (chosen)
    and `B + p` (rejected). `z` is the sum of `token_weights * logps` over unmasked tokens.
    """
    sequences = offsets.shape[0] - 1
    found = PairLosses(
        logps.new_empty((2, sequences // 2), dtype=torch.float32),
        logps.new_empty(sequences, dtype=torch.float32),
        logps.new_empty(sequences, dtype=torch.int64),
        torch.zeros_like(logps, dtype=torch.float32),
        logps.new_empty(sequences, dtype=torch.float32),
    )
    if sequences > 0:
        tensors = (logps, mask, token_weights, offsets, x, y)
        with on(logps.device):
            _pairs_kernel[(sequences // 2,)](
                *(None if tensor is None else tensor.contiguous() for tensor in tensors),
                *found,
                float(a),
                float(b),
                float(c),
                LOSS=LOSSES[loss],
                LENGTH_NORMALIZE=length_normalize,
                BLOCK=ELEMENTS,
                num_warps=ELEMENT_WARPS,
                **compile_options(),
            )
    return found


@triton.jit
def tvkd_pair(
    z_w, z_l, n_w, n_l, shaping_w, shaping_l, ref_w, ref_l, beta, alpha, smoothing
):  # fmt: skip
    """`d = m_w - m_l`, `m = (beta * (z - ref) - alpha * shaping) / n`; cDPO's loss of `d`."""
    d = (beta * (z_w - ref_w) - alpha * shaping_w) / n_w
    d -= (beta * (z_l - ref_l) - alpha * shaping_l) / n_l
    loss = -(1.0 - smoothing) * logsigmoid(d) - smoothing * logsigmoid(-d)
    by_d = smoothing * tl.sigmoid(d) - (1.0 - smoothing) * tl.sigmoid(-d)
    by_w, by_l = by_d / n_w, -by_d / n_l
    return loss, 0.0, beta * by_w, beta * by_l, -alpha * by_w, -alpha * by_l


@triton.jit
def drdo_pair(
    z_w, z_l, n_w, n_l, student_w, student_l, oracle_w, oracle_l, alpha, gamma, focal_slope
):  # fmt: skip
    """`(oracle - student gap) ** 2`, and `-alpha * focal * log_odds` of `z / n`.

    `focal = (1 - p_w) ** gamma` with `p_w = sigmoid(z_w - z_l)`; its derivative counts
    `focal_slope` times: 0 takes it as a constant.
    """
    z_w /= n_w
    z_l /= n_l
    # log(1 - exp(z_l)) is -inf at 0: stop at the smallest normal float32.
    below_zero = tl.minimum(z_l, -1.1754943508222875e-38)
    log_odds = z_w - log1mexp(below_zero)
    odds_by_z_l = tl.where(z_l > below_zero, 0.0, -tl.exp(below_zero) / expm1_negative(below_zero))
    weight = -alpha * tl.exp(gamma * logsigmoid(z_l - z_w))
    # d focal / d (z_l - z_w) = gamma * focal * p_w
    through_focal = -focal_slope * gamma * weight * tl.sigmoid(z_w - z_l) * log_odds
    by_z_w = (weight + through_focal) / n_w
    by_z_l = (weight * odds_by_z_l - through_focal) / n_l
    error = (oracle_w - oracle_l) - (student_w - student_l)
    return error * error, weight * log_odds, by_z_w, by_z_l, -2.0 * error, 2.0 * error


LOSSES = {"tvkd": tvkd_pair, "drdo": drdo_pair}


@triton.jit
def _pairs_kernel(
    logps_ptr, mask_ptr, weights_ptr,  # (N,), the weights may be None
    offsets_ptr,  # (2B + 1,)
    x_ptr, y_ptr,  # (2B,) or None
    terms_ptr,  # (2, B)
    logps_sums_ptr, lengths_ptr,  # (2B,)
    by_logps_ptr, by_x_ptr,  # (N,), (2B,)
    a, b, c, LOSS: tl.constexpr, LENGTH_NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair."""
    pairs = tl.num_programs(0)
    chosen = tl.program_id(0)
    rejected = pairs + chosen
    z_w, n_w = _sequence_sums(
        logps_ptr, mask_ptr, weights_ptr, offsets_ptr, logps_sums_ptr, lengths_ptr, chosen,
        LENGTH_NORMALIZE, BLOCK,
    )  # fmt: skip
    z_l, n_l = _sequence_sums(
        logps_ptr, mask_ptr, weights_ptr, offsets_ptr, logps_sums_ptr, lengths_ptr, rejected,
        LENGTH_NORMALIZE, BLOCK,
    )  # fmt: skip
    # A launch under torch.compile may hand Python floats over as float64.
    first_term, second_term, by_z_w, by_z_l, by_x_w, by_x_l = LOSS(
        z_w, z_l, n_w, n_l,
        _number(x_ptr, chosen), _number(x_ptr, rejected),
        _number(y_ptr, chosen), _number(y_ptr, rejected),
        tl.cast(a, tl.float32), tl.cast(b, tl.float32), tl.cast(c, tl.float32),
    )  # fmt: skip
    tl.store(terms_ptr + chosen, first_term)
    tl.store(terms_ptr + rejected, second_term)
    tl.store(by_x_ptr + chosen, by_x_w)
    tl.store(by_x_ptr + rejected, by_x_l)
    _spread(by_logps_ptr, mask_ptr, weights_ptr, offsets_ptr, chosen, by_z_w, BLOCK)
    _spread(by_logps_ptr, mask_ptr, weights_ptr, offsets_ptr, rejected, by_z_l, BLOCK)


@triton.jit
def _number(ptr, sequence):
    """A sequence's number, 0 without any."""
    number = tl.full((), 0.0, tl.float32)
    if ptr is not None:
        number = tl.load(ptr + sequence).to(tl.float32)
    return number


@triton.jit
def _sequence_sums(
    logps_ptr, mask_ptr, weights_ptr, offsets_ptr, logps_sums_ptr, lengths_ptr, sequence,
    LENGTH_NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weighted sum of a sequence's unmasked log-probabilities, and what divides it.

    Writes the sum without weights, and the length.
    """
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        kept = tl.load(mask_ptr + token, mask=token < end, other=0) != 0
        # Masked tokens are not read at all: whatever they hold cannot become NaN here.
        logps = tl.load(logps_ptr + token, mask=kept, other=0.0).to(tl.float32)
        total += logps
        if weights_ptr is not None:
            weighted += logps * tl.load(weights_ptr + token, mask=kept, other=0.0).to(tl.float32)
        count += kept.to(tl.int32)
    logps_sum = tl.sum(total, axis=0)
    length = tl.sum(count, axis=0)
    tl.store(logps_sums_ptr + sequence, logps_sum)
    tl.store(lengths_ptr + sequence, length)
    if weights_ptr is not None:
        logps_sum = tl.sum(weighted, axis=0)
    divisor = tl.full((), 1.0, tl.float32)
    if LENGTH_NORMALIZE:
        divisor = tl.maximum(length, 1).to(tl.float32)
    return logps_sum, divisor


@triton.jit
def _spread(
    by_logps_ptr, mask_ptr, weights_ptr, offsets_ptr, sequence, by_sum, BLOCK: tl.constexpr
):  # fmt: skip
    """`by_sum`, times a token's weight, at every unmasked token of a sequence, else 0."""
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        kept = tl.load(mask_ptr + token, mask=token < end, other=0) != 0
        values = tl.where(kept, by_sum, 0.0)
        if weights_ptr is not None:
            values *= tl.load(weights_ptr + token, mask=kept, other=0.0).to(tl.float32)
        tl.store(by_logps_ptr + token, values, mask=token < end)
