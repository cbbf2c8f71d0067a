"""The DRDO loss of every pair and its gradients, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ELEMENT_WARPS, ELEMENTS, on
from .numerics import expm1_negative, log1mexp, logsigmoid
from .sequences import sequence_sums, store_token_coefficients


def drdo_pairs(
    logps: Tensor,  # (N,) float32
    mask: Tensor,  # (N,) bool
    offsets: Tensor,  # (2B + 1,) int32 or int64
    student_rewards: Tensor,  # (2B,) float32
    oracle_rewards: Tensor,  # (2B,) float32
    *,
    alpha: float,
    gamma: float,
    length_normalize: bool,
    detach_focal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # (B,), (2B,), (2B,) int64, (N,), (B,)
    """Compute DRDO losses, logps_sums, lengths, d loss / d logps and d loss / d student difference.

    Sequence `s` owns tokens `offsets[s]` to `offsets[s + 1]`; pair `p` is sequences `p` (chosen,
    w) and `B + p` (rejected, l). With `z` the sum, or mean if `length_normalize`, of unmasked
    logps, `dr = rewards[p] - rewards[B + p]` of oracle and student, `p_w = sigmoid(z_w - z_l)`:
    `loss = (dr_oracle - dr_student) ** 2
            - alpha * (1 - p_w) ** gamma * (z_w - log(1 - exp(min(z_l, -eps))))`.
    `detach_focal` takes `(1 - p_w) ** gamma` as a constant.
    """
    sequences = offsets.shape[0] - 1
    losses = logps.new_empty(sequences // 2, dtype=torch.float32)
    logps_sums = logps.new_empty(sequences, dtype=torch.float32)
    lengths = logps.new_empty(sequences, dtype=torch.int64)
    token_coefficients = torch.zeros_like(logps, dtype=torch.float32)
    reward_coefficients = torch.empty_like(losses)
    if sequences > 0:
        with on(logps.device):
            _drdo_pairs_kernel[(sequences // 2,)](
                logps.contiguous(),
                mask.contiguous(),
                offsets.contiguous(),
                student_rewards.contiguous(),
                oracle_rewards.contiguous(),
                losses,
                logps_sums,
                lengths,
                token_coefficients,
                reward_coefficients,
                float(alpha),
                float(gamma),
                LENGTH_NORMALIZE=length_normalize,
                DETACH_FOCAL=detach_focal,
                BLOCK=ELEMENTS,
                num_warps=ELEMENT_WARPS,
            )
    return losses, logps_sums, lengths, token_coefficients, reward_coefficients


@triton.jit
def _sequence_logp(
    logps_ptr,  # (N,)
    mask_ptr,  # (N,) bool
    offsets_ptr,  # (2B + 1,)
    logps_sums_ptr,  # (2B,)
    lengths_ptr,  # (2B,)
    sequence,
    LENGTH_NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`z` of one sequence, and what its sum of logps was divided by."""
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    logps_sum, _, length = sequence_sums(logps_ptr, mask_ptr, None, start, end, BLOCK)
    tl.store(logps_sums_ptr + sequence, logps_sum)
    tl.store(lengths_ptr + sequence, length)
    divisor = tl.full((), 1.0, tl.float32)
    if LENGTH_NORMALIZE:
        divisor = tl.maximum(length, 1).to(tl.float32)
    return logps_sum / divisor, divisor


@triton.jit
def _drdo_pairs_kernel(
    logps_ptr,  # (N,)
    mask_ptr,  # (N,) bool
    offsets_ptr,  # (2B + 1,)
    student_rewards_ptr,  # (2B,)
    oracle_rewards_ptr,  # (2B,)
    losses_ptr,  # (B,)
    logps_sums_ptr,  # (2B,)
    lengths_ptr,  # (2B,)
    coefficients_ptr,  # (N,)
    reward_coefficients_ptr,  # (B,)
    alpha,
    gamma,
    LENGTH_NORMALIZE: tl.constexpr,
    DETACH_FOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair."""
    chosen = tl.program_id(0)
    rejected = tl.num_programs(0) + chosen
    # A launch under torch.compile may hand Python floats over as float64.
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    z_w, divisor_w = _sequence_logp(
        logps_ptr, mask_ptr, offsets_ptr, logps_sums_ptr, lengths_ptr, chosen,
        LENGTH_NORMALIZE, BLOCK,
    )  # fmt: skip
    z_l, divisor_l = _sequence_logp(
        logps_ptr, mask_ptr, offsets_ptr, logps_sums_ptr, lengths_ptr, rejected,
        LENGTH_NORMALIZE, BLOCK,
    )  # fmt: skip
    student = tl.load(student_rewards_ptr + chosen).to(tl.float32)
    student -= tl.load(student_rewards_ptr + rejected).to(tl.float32)
    oracle = tl.load(oracle_rewards_ptr + chosen).to(tl.float32)
    oracle -= tl.load(oracle_rewards_ptr + rejected).to(tl.float32)

    # log(1 - exp(z_l)) is -inf at 0: stop one float32 epsilon before.
    below_zero = tl.minimum(z_l, -1.1920928955078125e-07)
    log_odds = z_w - log1mexp(below_zero)
    odds_by_z_l = tl.where(z_l > below_zero, 0.0, -tl.exp(below_zero) / expm1_negative(below_zero))
    focal = tl.exp(gamma * logsigmoid(z_l - z_w))
    error = oracle - student
    tl.store(losses_ptr + chosen, error * error - alpha * focal * log_odds)
    tl.store(reward_coefficients_ptr + chosen, -2.0 * error)

    by_z_w = -alpha * focal
    by_z_l = -alpha * focal * odds_by_z_l
    if not DETACH_FOCAL:
        # d focal / d (z_l - z_w) = gamma * focal * p_w
        through_focal = alpha * gamma * focal * tl.sigmoid(z_w - z_l) * log_odds
        by_z_w += through_focal
        by_z_l -= through_focal
    store_token_coefficients(
        coefficients_ptr, mask_ptr, None, by_z_w / divisor_w,
        tl.load(offsets_ptr + chosen), tl.load(offsets_ptr + chosen + 1), BLOCK,
    )  # fmt: skip
    store_token_coefficients(
        coefficients_ptr, mask_ptr, None, by_z_l / divisor_l,
        tl.load(offsets_ptr + rejected), tl.load(offsets_ptr + rejected + 1), BLOCK,
    )  # fmt: skip
