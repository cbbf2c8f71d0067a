"""Softmax arithmetic on one tile of projections, between the matrix products around it.

A tile holds `w` columns of `x = hidden @ weight.T + bias` for `n` rows: those of the vocabulary
from `vocab_start` on.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import ELEMENT_WARPS, ELEMENTS, on
from .numerics import FAR, Transform, transform_arguments, transform_logits


def fold_tile(
    tile: Tensor,  # (n, w) float32
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: Transform,
    maximum: Tensor,  # (n,) float32
    sum_exp: Tensor,  # (n,) float32
    target_logit: Tensor,  # (n,) float32
    rest: Tensor | None = None,  # (n,) float32
    shortfall: Tensor | None = None,  # (n,) float32
    exponentials: Tensor | None = None,  # (n, w)
    rescale: Tensor | None = None,  # (n,) float32
) -> None:
    """Fold a tile into running statistics, in place; the label's column stays out of them.

    With `z = T(tile)`: `maximum = max(maximum, z)`, `sum_exp = sum(exp(z - maximum))` over all
    columns seen, `target_logit = z[label]` if the label is in this tile. Start from the lowest
    finite float32, 0 and NaN. Vectors written to are contiguous; matrices have contiguous rows.

    `rest`, given with `shortfall`, is `sum_exp` without the largest logit, so that it keeps its
    digits where the sum is nearly one; `shortfall = sum(exp(z - maximum) * (maximum - z))`. Both
    start from 0.

    `exponentials` receives `exp(z - maximum) * dz/dx`, 0 at the label, and `rescale`, given with
    it, `exp(previous maximum - maximum)`: what was accumulated before needs this factor.
    `exponentials` may be `tile` itself.
    """
    n_rows, width = tile.shape
    assert all(vector.is_contiguous() for vector in (maximum, sum_exp, target_logit))
    if n_rows == 0:
        return
    with on(tile.device):
        _fold_tile_kernel[(n_rows,)](
            tile,
            None if labels is None else labels.contiguous(),
            maximum,
            sum_exp,
            target_logit,
            rest,
            shortfall,
            exponentials,
            rescale,
            width,
            vocab_start,
            tile.stride(0),
            0 if exponentials is None else exponentials.stride(0),
            **transform_arguments(transform),
            BLOCK=ELEMENTS,
            num_warps=ELEMENT_WARPS,
        )


def gradient_tile(
    tile: Tensor,  # (n, w) float32
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: Transform,
    lse: Tensor,  # (n,) float32, not -inf
    probability_coefficients: Tensor,  # (n,) float32
    label_coefficients: Tensor,  # (n,) float32
    out: Tensor,  # (n, w)
) -> None:
    """Write the gradient with respect to a tile's projections to `out`.

    With `z = T(tile)`: `probability_coefficients * exp(z - lse) * dz/dx`, and at the label's column
    `label_coefficients * dz/dx` instead. `out` may be `tile` itself.
    """
    n_rows, width = tile.shape
    if n_rows == 0:
        return
    with on(tile.device):
        _gradient_tile_kernel[(n_rows, triton.cdiv(width, ELEMENTS))](
            tile,
            None if labels is None else labels.contiguous(),
            lse.contiguous(),
            probability_coefficients.contiguous(),
            label_coefficients.contiguous(),
            out,
            width,
            vocab_start,
            tile.stride(0),
            out.stride(0),
            **transform_arguments(transform),
            BLOCK=ELEMENTS,
            num_warps=ELEMENT_WARPS,
        )


@triton.jit(do_not_specialize=["vocab_start"])
def _fold_tile_kernel(
    tile_ptr,  # (n, w)
    labels_ptr,  # (n,) or None
    maximum_ptr,  # (n,)
    sum_exp_ptr,  # (n,)
    target_logit_ptr,  # (n,)
    rest_ptr,  # (n,) or None
    shortfall_ptr,  # (n,), or None with rest_ptr
    exponentials_ptr,  # (n, w) or None
    rescale_ptr,  # (n,), or None with exponentials_ptr
    width, vocab_start, tile_stride, exponentials_stride, logit_scale, softcap, temperature,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: a sweep for the maximum, and one for the exponentials."""
    row = tl.program_id(0).to(tl.int64)
    tile_ptr += row * tile_stride
    label = -1
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row) - vocab_start

    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    target_logit = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(tile_ptr + column, mask=column < width, other=0.0)
        z, _ = transform_logits(x, logit_scale, softcap, temperature, HAS_SOFTCAP)
        target_logit += tl.where(column == label, z, 0.0)
        counted = (column < width) & (column != label)
        largest = tl.maximum(largest, tl.where(counted, z, -float("inf")))
    if labels_ptr is not None:
        in_tile = (label >= 0) & (label < width)
        tl.store(target_logit_ptr + row, tl.sum(target_logit, axis=0), mask=in_tile)
    old_maximum = tl.load(maximum_ptr + row)
    # At least the finite start, so that no difference below is NaN when every logit is -inf.
    maximum = tl.maximum(old_maximum, tl.max(largest, axis=0))

    sums = tl.zeros((BLOCK,), tl.float32)
    tops = tl.zeros((BLOCK,), tl.float32)
    shortfalls = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(tile_ptr + column, mask=column < width, other=0.0)
        z, slope = transform_logits(x, logit_scale, softcap, temperature, HAS_SOFTCAP)
        counted = (column < width) & (column != label)
        exponential = tl.where(counted, tl.exp(z - maximum), 0.0)
        if rest_ptr is None:
            sums += exponential
        else:
            is_top = counted & (z == maximum)
            exponential_of_rest = tl.where(is_top, 0.0, exponential)
            tops += tl.where(is_top, 1.0, 0.0)
            sums += exponential_of_rest
            # 0 times -inf would be NaN.
            shortfalls += exponential_of_rest * tl.minimum(maximum - z, FAR)
        if exponentials_ptr is not None:
            out_ptrs = exponentials_ptr + row * exponentials_stride + column
            tl.store(out_ptrs, exponential * slope, mask=column < width)
    rise = maximum - old_maximum
    rescale = tl.exp(-rise)
    old_sum = tl.load(sum_exp_ptr + row)
    tile_sum = tl.sum(sums, axis=0)
    if rest_ptr is not None:
        tile_tops = tl.sum(tops, axis=0)
        # The largest so far becomes one of the rest where this tile has a larger one, which is out.
        raised = tl.where(rise > 0.0, 1.0, 0.0)
        rest = (tl.load(rest_ptr + row) + raised) * rescale + (tile_sum + (tile_tops - raised))
        tl.store(rest_ptr + row, rest)
        shortfall = (tl.load(shortfall_ptr + row) + rise * old_sum) * rescale
        tl.store(shortfall_ptr + row, shortfall + tl.sum(shortfalls, axis=0))
        tile_sum += tile_tops
    tl.store(sum_exp_ptr + row, old_sum * rescale + tile_sum)
    tl.store(maximum_ptr + row, maximum)
    if exponentials_ptr is not None:
        tl.store(rescale_ptr + row, rescale)


@triton.jit(do_not_specialize=["vocab_start"])
def _gradient_tile_kernel(
    tile_ptr,  # (n, w)
    labels_ptr,  # (n,) or None
    lse_ptr,  # (n,)
    probability_coefficients_ptr,  # (n,)
    label_coefficients_ptr,  # (n,)
    out_ptr,  # (n, w)
    width, vocab_start, tile_stride, out_stride, logit_scale, softcap, temperature,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(tile_ptr + row * tile_stride + column, mask=column < width, other=0.0)
    z, slope = transform_logits(x, logit_scale, softcap, temperature, HAS_SOFTCAP)
    probability = tl.exp(z - tl.load(lse_ptr + row))
    gradient = tl.load(probability_coefficients_ptr + row) * probability
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row) - vocab_start
        gradient = tl.where(column == label, tl.load(label_coefficients_ptr + row), gradient)
    tl.store(out_ptr + row * out_stride + column, gradient * slope, mask=column < width)
