"""Softmax arithmetic on one tile of projections, between the matrix products around it.

A tile holds `w` columns of `x = hidden @ weight.T + bias` for `n` rows: those of the vocabulary
from `vocab_start` on. Exponentials are relative to a reference of each row, and stay so: nothing is
ever added to it before differences are taken, as the digits of small differences would be lost.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import ELEMENTS, compile_options, on
from .numerics import FAR, HEADROOM, Transform, exp, transform_arguments, transform_logits

# A program has a block of columns of one row. The more logits a thread has, the less each of them
# pays for sums over threads and warps. The numbers that statistics take need registers, too, and
# rows of more columns than this come in small numbers, so that more warps share one.
MIN_BLOCK = 128  # at least one logit for each thread, as `ELEMENTS`
ROW_BLOCK = 4096
WIDE_ROW_BLOCK = 1024  # of rows that are wider than that
LOGITS_PER_WARP = 2048


def fold_tile(
    tile: Tensor,  # (n, w) float32
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: Transform,
    reference: Tensor,  # (n,) float32
    sum_exp: Tensor,  # (n,) float32
    target_logit: Tensor,  # (n,) float32
    rest: Tensor | None = None,  # (n,) float32
    shortfall: Tensor | None = None,  # (n,) float32
    exponentials: Tensor | None = None,  # (n, w)
    earlier: tuple[Tensor, ...] = (),  # up to two, (n, k)
) -> None:
    """Fold a tile into running statistics, in place; the label's column stays out of them.

    With `z = T(tile)`: `sum_exp = sum(exp(z - reference))` over all columns seen, and
    `target_logit = z[label]` if the label is in this tile. Start from the lowest finite float32
    (the reference), 0 and NaN. The reference becomes the largest logit of the tile where that is
    more than `HEADROOM` above it, else it stays. Vectors are contiguous; matrices have contiguous
    rows.

    `rest`, given with `shortfall`, is `sum_exp` without the largest logit, so that it keeps its
    digits where the sum is nearly one; `shortfall = sum(exp(z - reference) * (reference - z))`.
    Both start from 0. With them the reference is the largest logit.

    `exponentials` receives `exp(z - reference) * damping`, 0 at the label, and may be `tile`.
    `earlier` is what was made of earlier tiles' exponentials: rows whose reference rises are
    multiplied by `exp(old reference - new reference)`.
    """
    n_rows, width = tile.shape
    assert all(vector.is_contiguous() for vector in (reference, sum_exp, target_logit))
    if n_rows == 0:
        return
    first, second = (*earlier, None, None)[:2]
    several = width > ROW_BLOCK
    block = _block(width, WIDE_ROW_BLOCK if several else ROW_BLOCK)
    logits_per_warp = LOGITS_PER_WARP // (4 if several else 2 if rest is not None else 1)
    with on(tile.device):
        _fold_tile_kernel[(n_rows,)](
            tile,
            None if labels is None else labels.contiguous(),
            reference,
            sum_exp,
            target_logit,
            rest,
            shortfall,
            exponentials,
            first,
            second,
            width,
            vocab_start,
            tile.stride(0),
            0 if exponentials is None else exponentials.stride(0),
            *_width_and_stride(first),
            *_width_and_stride(second),
            **transform_arguments(transform),
            EVEN=width % block == 0,
            SEVERAL_BLOCKS=width > block,
            BLOCK=block,
            EARLIER_BLOCK=ELEMENTS,
            num_warps=_warps(block, logits_per_warp),
            **compile_options(many_registers=rest is not None),
        )


def gradient_tile(
    tile: Tensor,  # (n, w) float32
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: Transform,
    reference: Tensor,  # (n,) float32
    coefficients: Tensor,  # (n,) float32
    label_gradients: Tensor,  # (n,) float32
    out: Tensor,  # (n, w)
) -> None:
    """Write the gradient with respect to a tile's logits, times their damping, to `out`.

    With `z = T(tile)`: `coefficients * exp(z - reference) * damping`, and `label_gradients` as they
    are at the label's column. `out` may be `tile` itself.
    """
    n_rows, width = tile.shape
    if n_rows == 0:
        return
    block = _block(width, ROW_BLOCK)
    with on(tile.device):
        _gradient_tile_kernel[(n_rows, triton.cdiv(width, block))](
            tile,
            None if labels is None else labels.contiguous(),
            reference.contiguous(),
            coefficients.contiguous(),
            label_gradients.contiguous(),
            out,
            width,
            vocab_start,
            tile.stride(0),
            out.stride(0),
            **transform_arguments(transform),
            EVEN=width % block == 0,
            BLOCK=block,
            num_warps=_warps(block, LOGITS_PER_WARP),
            **compile_options(),
        )


def gradient_of_kept_tile(
    exponentials: Tensor,  # (n, w), damped
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    kept_reference: Tensor,  # (n,) float32
    reference: Tensor,  # (n,) float32
    coefficients: Tensor,  # (n,) float32
    label_gradients: Tensor,  # (n,) float32
    out: Tensor,  # (n, w)
) -> None:
    """Write to `out` what `gradient_tile` would, of a tile that `fold_tile` left.

    That is `coefficients * exp(kept_reference - reference) * exponentials`.
    """
    n_rows, width = exponentials.shape
    if n_rows == 0:
        return
    block = _block(width, ROW_BLOCK)
    with on(out.device):
        _gradient_of_kept_tile_kernel[(n_rows, triton.cdiv(width, block))](
            exponentials,
            None if labels is None else labels.contiguous(),
            kept_reference.contiguous(),
            reference.contiguous(),
            coefficients.contiguous(),
            label_gradients.contiguous(),
            out,
            width,
            vocab_start,
            exponentials.stride(0),
            out.stride(0),
            EVEN=width % block == 0,
            BLOCK=block,
            num_warps=_warps(block, LOGITS_PER_WARP),
            **compile_options(),
        )


def _block(width: int, largest: int) -> int:
    block: int = triton.next_power_of_2(width)
    return min(max(block, MIN_BLOCK), largest)


def _warps(block: int, logits_per_warp: int) -> int:
    return max(1, block // logits_per_warp)


def _width_and_stride(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.shape[1], matrix.stride(0))


@triton.jit(do_not_specialize=["vocab_start"])
def _fold_tile_kernel(
    tile_ptr,  # (n, w)
    labels_ptr,  # (n,) or None
    reference_ptr,  # (n,)
    sum_exp_ptr,  # (n,)
    target_logit_ptr,  # (n,)
    rest_ptr,  # (n,) or None
    shortfall_ptr,  # (n,), or None with rest_ptr
    exponentials_ptr,  # (n, w) or None
    first_ptr,  # (n, first_width) or None: what was made of earlier exponentials
    second_ptr,  # (n, second_width) or None: likewise
    width, vocab_start, tile_stride, exponentials_stride, first_width, first_stride,
    second_width, second_stride, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr, EVEN: tl.constexpr,
    SEVERAL_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, EARLIER_BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. It is read once; what does not fit into one block is read twice."""
    row = tl.program_id(0).to(tl.int64)
    tile_ptr += row * tile_stride
    if exponentials_ptr is not None:
        exponentials_ptr += row * exponentials_stride
    label = -1
    if labels_ptr is not None:
        label = _label_column(labels_ptr + row, vocab_start, width)
        if label >= 0:
            x = tl.load(tile_ptr + label)
            z, _ = transform_logits(x, inner, outer, HAS_SOFTCAP, HAS_FACTOR)
            tl.store(target_logit_ptr + row, z)
            # No thread goes on to overwrite the tile before all have read the label's logit.
            tl.debug_barrier()

    z, damping = load_logits(
        tile_ptr, 0, width, label, inner, outer,
        labels_ptr is not None, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK,
    )  # fmt: skip
    largest = tl.max(z, axis=0)
    if SEVERAL_BLOCKS:
        for start in range(BLOCK, width, BLOCK):
            later, _ = load_logits(
                tile_ptr, start, width, label, inner, outer,
                labels_ptr is not None, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(later, axis=0))
    old_reference = tl.load(reference_ptr + row)
    old_sum = tl.load(sum_exp_ptr + row)
    # The start is finite, so no difference is NaN while every logit is -inf.
    headroom: tl.constexpr = HEADROOM if rest_ptr is None else 0.0
    rises = largest - old_reference > headroom
    reference = tl.where(rises, largest, old_reference)
    rescale = exp(old_reference - reference)

    tile_sum = 0.0
    tops = 0.0
    tile_shortfall = 0.0
    for start in range(0, width if SEVERAL_BLOCKS else BLOCK, BLOCK):
        if SEVERAL_BLOCKS:
            z, damping = load_logits(
                tile_ptr, start, width, label, inner, outer,
                labels_ptr is not None, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK,
            )  # fmt: skip
        block_sum, block_tops, block_shortfall = _fold_block(
            z, damping, reference, exponentials_ptr, start, width, rest_ptr is not None, EVEN, BLOCK
        )
        tile_sum += block_sum
        tops += block_tops
        tile_shortfall += block_shortfall
    if rest_ptr is not None:
        # The largest so far becomes one of the rest where this tile has a larger one, which is out.
        raised = tl.where(rises, 1.0, 0.0)
        rest = (tl.load(rest_ptr + row) + raised) * rescale + (tile_sum + (tops - raised))
        tl.store(rest_ptr + row, rest)
        rise = tl.minimum(reference - old_reference, FAR)
        shortfall = (tl.load(shortfall_ptr + row) + rise * old_sum) * rescale
        tl.store(shortfall_ptr + row, shortfall + tile_shortfall)
        tile_sum += tops
    tl.store(sum_exp_ptr + row, old_sum * rescale + tile_sum)
    if rises:
        tl.store(reference_ptr + row, reference)
        if first_ptr is not None:
            _rescale_row(first_ptr + row * first_stride, first_width, rescale, EARLIER_BLOCK)
        if second_ptr is not None:
            _rescale_row(second_ptr + row * second_stride, second_width, rescale, EARLIER_BLOCK)


@triton.jit(do_not_specialize=["vocab_start"])
def _gradient_tile_kernel(
    tile_ptr,  # (n, w)
    labels_ptr,  # (n,) or None
    reference_ptr,  # (n,)
    coefficients_ptr,  # (n,)
    label_gradients_ptr,  # (n,)
    out_ptr,  # (n, w)
    width, vocab_start, tile_stride, out_stride, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    # The label's own logit is not hidden: it may lie far above the reference, but is overwritten.
    z, damping = load_logits(
        tile_ptr + row * tile_stride, start, width, -1, inner, outer,
        False, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK,
    )  # fmt: skip
    gradient = exp(z - tl.load(reference_ptr + row)) * tl.load(coefficients_ptr + row) * damping
    gradient = _with_label(
        gradient, labels_ptr, label_gradients_ptr, row, start, vocab_start, width, BLOCK
    )
    _store(out_ptr + row * out_stride, column, gradient, width, EVEN)


@triton.jit(do_not_specialize=["vocab_start"])
def _gradient_of_kept_tile_kernel(
    exponentials_ptr,  # (n, w)
    labels_ptr,  # (n,) or None
    kept_reference_ptr,  # (n,)
    reference_ptr,  # (n,)
    coefficients_ptr,  # (n,)
    label_gradients_ptr,  # (n,)
    out_ptr,  # (n, w)
    width, vocab_start, exponentials_stride, out_stride, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    exponentials_ptrs = exponentials_ptr + row * exponentials_stride + column
    if EVEN:
        exponentials = tl.load(exponentials_ptrs)
    else:
        exponentials = tl.load(exponentials_ptrs, mask=column < width, other=0.0)
    rise = exp(tl.load(kept_reference_ptr + row) - tl.load(reference_ptr + row))
    gradient = exponentials.to(tl.float32) * (rise * tl.load(coefficients_ptr + row))
    gradient = _with_label(
        gradient, labels_ptr, label_gradients_ptr, row, start, vocab_start, width, BLOCK
    )
    _store(out_ptr + row * out_stride, column, gradient, width, EVEN)


@triton.jit
def _with_label(
    gradient, labels_ptr, label_gradients_ptr, row, start, vocab_start, width, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of gradients with the label's own in its column, if it is there."""
    if labels_ptr is not None:
        label = _label_column(labels_ptr + row, vocab_start, width)
        if (label >= start) & (label < start + BLOCK):
            at_label = tl.load(label_gradients_ptr + row)
            gradient = tl.where(start + tl.arange(0, BLOCK) == label, at_label, gradient)
    return gradient


@triton.jit
def _label_column(label_ptr, vocab_start, width):
    """The column of a row's label in the tile, -1 if it is in none."""
    label = tl.load(label_ptr) - vocab_start
    return tl.where((label >= 0) & (label < width), label, -1).to(tl.int32)


@triton.jit
def load_logits(
    row_ptr, start, width, label, inner, outer,
    HAS_LABELS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK,) of a row from `start` on, and their damping.

    They are -inf at the label and past the end of the row.
    """
    column = start + tl.arange(0, BLOCK)
    if EVEN:
        x = tl.load(row_ptr + column)
    else:
        x = tl.load(row_ptr + column, mask=column < width, other=0.0)
    z, damping = transform_logits(x, inner, outer, HAS_SOFTCAP, HAS_FACTOR)
    if not EVEN:
        z = tl.where(column < width, z, -float("inf"))
    if HAS_LABELS:
        # Few tiles hold a row's label: only there are columns compared with it.
        if (label >= start) & (label < start + BLOCK):
            z = tl.where(column == label, -float("inf"), z)
    return z, damping


@triton.jit
def _fold_block(
    z, damping, reference, exponentials_ptr, start, width,
    HAS_REST: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block's exponentials; their sum, and with HAS_REST three numbers.

    These are the sum without logits that equal the reference, the number of such logits, and the
    shortfall.
    """
    exponential = exp(z - reference)
    tops = 0.0
    shortfall = 0.0
    summed = exponential
    if HAS_REST:
        is_top = z == reference
        # One each, but NaN where the largest is infinite.
        tops = tl.sum(tl.where(is_top, exponential, 0.0), axis=0)
        summed = tl.where(is_top, 0.0, exponential)
        # 0 times -inf would be NaN.
        shortfall = tl.sum(summed * tl.minimum(reference - z, FAR), axis=0)
    if exponentials_ptr is not None:
        column = start + tl.arange(0, BLOCK)
        _store(exponentials_ptr, column, exponential * damping, width, EVEN)
    return tl.sum(summed, axis=0), tops, shortfall


@triton.jit
def _store(row_ptr, column, values, width, EVEN: tl.constexpr):
    if EVEN:
        tl.store(row_ptr + column, values)
    else:
        tl.store(row_ptr + column, values, mask=column < width)


@triton.jit
def _rescale_row(row_ptr, width, factor, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(row_ptr + column, mask=column < width).to(tl.float32)
        # Before a row's first finite logit there is nothing, whatever was in memory.
        values = tl.where(factor > 0.0, values * factor, 0.0)
        tl.store(row_ptr + column, values, mask=column < width)
