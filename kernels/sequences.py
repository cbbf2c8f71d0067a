"""Sums over the tokens of one sequence, and gradients spread back over them."""

import triton
import triton.language as tl


@triton.jit
def sequence_sums(
    logps_ptr,  # (N,)
    mask_ptr,  # (N,) bool
    weights_ptr,  # (N,) or None
    start,
    end,
    BLOCK: tl.constexpr,
):
    """Over the unmasked tokens of `[start, end)`: sum of logps, weighted sum, and their number."""
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
    weighted_sum = logps_sum
    if weights_ptr is not None:
        weighted_sum = tl.sum(weighted, axis=0)
    return logps_sum, weighted_sum, tl.sum(count, axis=0)


@triton.jit
def store_token_coefficients(
    coefficients_ptr,  # (N,)
    mask_ptr,  # (N,) bool
    weights_ptr,  # (N,) or None
    coefficient,
    start,
    end,
    BLOCK: tl.constexpr,
):
    """`coefficient`, times a token's weight, at every unmasked token of `[start, end)`, else 0."""
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        kept = tl.load(mask_ptr + token, mask=token < end, other=0) != 0
        values = tl.where(kept, coefficient, 0.0)
        if weights_ptr is not None:
            values *= tl.load(weights_ptr + token, mask=kept, other=0.0).to(tl.float32)
        tl.store(coefficients_ptr + token, values, mask=token < end)
