"""The TVKD loss of every pair and its gradient, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ELEMENT_WARPS, ELEMENTS, on
from .numerics import logsigmoid
from .sequences import sequence_sums, store_token_coefficients


def tvkd_pairs(
    logps: Tensor,  # (N,) float32
    mask: Tensor,  # (N,) bool
    offsets: Tensor,  # (2B + 1,) int32 or int64
    shaping: Tensor,  # (2B,) float32
    ref_logps: Tensor | None,  # (2B,) float32
    token_weights: Tensor | None,  # (N,) float32
    *,
    beta: float,
    alpha: float,
    label_smoothing: float,
    length_normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (B,), (2B,), (2B,) int64, (N,)
    """Compute TVKD losses, logps_sums, lengths, and d loss / d logps of every token.

    Sequence `s` owns tokens `offsets[s]` to `offsets[s + 1]`; pair `p` is sequences `p` (chosen)
    and `B + p` (rejected). With `S` the sum of `token_weights * logps` over unmasked tokens:
    `m = beta * (S - ref_logps) - alpha * shaping`, divided by the length if `length_normalize`;
    `d = m_chosen - m_rejected`; `loss = -(1 - eps) logsigmoid(d) - eps logsigmoid(-d)`.
    `logps_sums` has no weights. With `alpha == 0` the shaping is not read.
    """
    sequences = offsets.shape[0] - 1
    losses = logps.new_empty(sequences // 2, dtype=torch.float32)
    logps_sums = logps.new_empty(sequences, dtype=torch.float32)
    lengths = logps.new_empty(sequences, dtype=torch.int64)
    token_coefficients = torch.zeros_like(logps, dtype=torch.float32)
    if sequences > 0:
        with on(logps.device):
            _tvkd_pairs_kernel[(sequences // 2,)](
                logps.contiguous(),
                mask.contiguous(),
                offsets.contiguous(),
                None if alpha == 0 else shaping.contiguous(),
                None if ref_logps is None else ref_logps.contiguous(),
                None if token_weights is None else token_weights.contiguous(),
                losses,
                logps_sums,
                lengths,
                token_coefficients,
                float(beta),
                float(alpha),
                float(label_smoothing),
                LENGTH_NORMALIZE=length_normalize,
                BLOCK=ELEMENTS,
                num_warps=ELEMENT_WARPS,
            )
    return losses, logps_sums, lengths, token_coefficients


@triton.jit
def _margin(
    logps_ptr,  # (N,)
    mask_ptr,  # (N,) bool
    offsets_ptr,  # (2B + 1,)
    shaping_ptr,  # (2B,) or None
    ref_logps_ptr,  # (2B,) or None
    weights_ptr,  # (N,) or None
    logps_sums_ptr,  # (2B,)
    lengths_ptr,  # (2B,)
    sequence,
    beta,
    alpha,
    LENGTH_NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`m` of one sequence, and its derivative by the weighted sum of logps."""
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    logps_sum, weighted_sum, length = sequence_sums(
        logps_ptr, mask_ptr, weights_ptr, start, end, BLOCK
    )
    tl.store(logps_sums_ptr + sequence, logps_sum)
    tl.store(lengths_ptr + sequence, length)
    if ref_logps_ptr is not None:
        weighted_sum -= tl.load(ref_logps_ptr + sequence).to(tl.float32)
    margin = beta * weighted_sum
    if shaping_ptr is not None:
        margin -= alpha * tl.load(shaping_ptr + sequence).to(tl.float32)
    slope = beta
    if LENGTH_NORMALIZE:
        divisor = tl.maximum(length, 1).to(tl.float32)
        margin /= divisor
        slope /= divisor
    return margin, slope


@triton.jit
def _tvkd_pairs_kernel(
    logps_ptr,  # (N,)
    mask_ptr,  # (N,) bool
    offsets_ptr,  # (2B + 1,)
    shaping_ptr,  # (2B,) or None
    ref_logps_ptr,  # (2B,) or None
    weights_ptr,  # (N,) or None
    losses_ptr,  # (B,)
    logps_sums_ptr,  # (2B,)
    lengths_ptr,  # (2B,)
    coefficients_ptr,  # (N,)
    beta,
    alpha,
    label_smoothing,
    LENGTH_NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair."""
    chosen = tl.program_id(0)
    rejected = tl.num_programs(0) + chosen
    # A launch under torch.compile may hand Python floats over as float64.
    beta = tl.cast(beta, tl.float32)
    alpha = tl.cast(alpha, tl.float32)
    smoothing = tl.cast(label_smoothing, tl.float32)
    chosen_margin, chosen_slope = _margin(
        logps_ptr, mask_ptr, offsets_ptr, shaping_ptr, ref_logps_ptr, weights_ptr,
        logps_sums_ptr, lengths_ptr, chosen, beta, alpha, LENGTH_NORMALIZE, BLOCK,
    )  # fmt: skip
    rejected_margin, rejected_slope = _margin(
        logps_ptr, mask_ptr, offsets_ptr, shaping_ptr, ref_logps_ptr, weights_ptr,
        logps_sums_ptr, lengths_ptr, rejected, beta, alpha, LENGTH_NORMALIZE, BLOCK,
    )  # fmt: skip
    difference = chosen_margin - rejected_margin
    loss = -(1.0 - smoothing) * logsigmoid(difference) - smoothing * logsigmoid(-difference)
    tl.store(losses_ptr + chosen, loss)

    by_difference = smoothing * tl.sigmoid(difference) - (1.0 - smoothing) * tl.sigmoid(-difference)
    store_token_coefficients(
        coefficients_ptr, mask_ptr, weights_ptr, by_difference * chosen_slope,
        tl.load(offsets_ptr + chosen), tl.load(offsets_ptr + chosen + 1), BLOCK,
    )  # fmt: skip
    store_token_coefficients(
        coefficients_ptr, mask_ptr, weights_ptr, -by_difference * rejected_slope,
        tl.load(offsets_ptr + rejected), tl.load(offsets_ptr + rejected + 1), BLOCK,
    )  # fmt: skip
