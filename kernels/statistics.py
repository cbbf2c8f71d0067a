"""Numbers of every row of `hidden @ weight.T` from which all vocabulary statistics follow."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import projection_config
from .numerics import FAR, LOWEST, Transform, exp, transform_logits
from .projection import launch_projection, load_labels, project_tile, rows_of_program

# The tiles for few rows keep more numbers a thread, and have no registers for so many sums.
MANY_ROWS = 4096


def projection_partials(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    rows: Tensor | None,  # (n,) int64
    transform: Transform,
    second: bool,
    shortfall: bool,
    squares: bool,
) -> tuple[Tensor, Tensor]:  # (5, splits, n) float32, (n,) float32
    """Compute five numbers of each split of the vocabulary, and the label's logit.

    `z = T(hidden[rows] @ weight.T + bias)`, `rows=None` is every row. With `top` the column of a
    split's largest logit, the numbers are in turn: `z[top]`; the largest of the others; the sums
    over the others of `e = exp(z - z[top])`, of `e * (z[top] - z)` and of `e ** 2`. `second`,
    `shortfall` and `squares` say whether the second, fourth and fifth are wanted; if not, they are
    0. Where all logits are -inf, so is `z[top]`, and the sums are 0. The label's logit is NaN for a
    label outside `[0, V)`, and empty with `labels=None`.
    """
    target_logit, parts = launch_projection(
        _projection_partials_kernel, hidden, weight, bias, labels, rows, transform,
        projection_config(hidden, weight, MANY_ROWS), numbers=5,
        SECOND=second, SHORTFALL=shortfall, SQUARES=squares,
    )  # fmt: skip
    return parts, target_logit


# These vary from batch to batch and need no code of their own; sizes and strides are worth theirs.
@triton.jit(do_not_specialize=["n_rows", "splits", "tiles_per_split"])
def _projection_partials_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or None
    labels_ptr,  # (n,) or None
    rows_ptr,  # (n,) or None
    target_logit_ptr,  # (n,)
    parts_ptr,  # (5, splits, n)
    n_rows, vocab_size, hidden_size, splits, tiles_per_split,
    hidden_stride_row, hidden_stride_col, weight_stride_row, weight_stride_col,
    inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr, SECOND: tl.constexpr,
    SHORTFALL: tl.constexpr, SQUARES: tl.constexpr, EVEN_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the vocabulary."""
    split, row, row_exists, hidden_rows = rows_of_program(
        hidden_ptr, rows_ptr, n_rows, splits, hidden_stride_row, GROUP_ROWS, BLOCK_ROWS
    )
    if labels_ptr is not None:
        label = load_labels(labels_ptr, row, vocab_size)

    maximum = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    second = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    others = tl.zeros((BLOCK_ROWS,), tl.float32)
    shortfall = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab_size, BLOCK_VOCAB))
    for tile in range(first_tile, end_tile):
        x = project_tile(
            hidden_rows, weight_ptr, tile, vocab_size, hidden_size,
            hidden_stride_col, weight_stride_row, weight_stride_col,
            EVEN_HIDDEN, BLOCK_ROWS, BLOCK_VOCAB, BLOCK_HIDDEN,
        )  # fmt: skip
        column = tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        if bias_ptr is not None:
            # Not masked, which would cost registers: columns past the end are dropped below.
            bias = tl.load(bias_ptr + tl.minimum(column, vocab_size - 1))
            x += bias.to(tl.float32)[None, :]
        z, _ = transform_logits(x, inner, outer, HAS_SOFTCAP, HAS_FACTOR)
        z = tl.where((column < vocab_size)[None, :], z, -float("inf"))
        if labels_ptr is not None:
            in_tile = (label >= tile * BLOCK_VOCAB) & (label < (tile + 1) * BLOCK_VOCAB)
            if tl.max(in_tile.to(tl.int32), axis=0) == 1:
                is_label = column[None, :] == label[:, None]
                target_logit = tl.sum(tl.where(is_label, z, 0.0), axis=1)
                # One tile holds the label; nobody writes where none does.
                tl.store(target_logit_ptr + row, target_logit, mask=row_exists & in_tile)

        # A finite reference keeps `z - reference` from being NaN while every logit is -inf.
        tile_maximum = tl.max(z, axis=1)
        reference = tl.maximum(tile_maximum, LOWEST)[:, None]
        is_top = z == reference
        tops = tl.sum(is_top.to(tl.float32), axis=1)
        # One top is left out, whatever its column; if there are more, the rest are others. A tile
        # of -inf alone has none, but its weight below is 0.
        more_tops = tops - 1.0
        if SECOND:
            runner_up = tl.max(tl.where(is_top, -float("inf"), z), axis=1)
            runner_up = tl.where(tops > 1.0, tile_maximum, runner_up)
            second = tl.maximum(second, runner_up)
            second = tl.maximum(second, tl.minimum(maximum, tile_maximum))
        # Maxima drop NaN on GPUs, and here it is kept: all sums are of these.
        difference = tl.maximum(z - reference, -FAR, propagate_nan=tl.PropagateNan.ALL)
        exponentials = tl.where(is_top, 0.0, exp(difference))
        tile_others = more_tops + tl.sum(exponentials, axis=1)

        # Join what was found before with this tile, the one with the lower maximum rescaled: its
        # own top becomes one of the others.
        new_maximum = tl.maximum(maximum, tile_maximum)
        reference = tl.maximum(new_maximum, LOWEST)
        before = tl.minimum(reference - maximum, FAR)
        now = tl.minimum(reference - tile_maximum, FAR)
        weight_before = exp(-before)
        weight_now = exp(-now)
        lower_top = weight_before * weight_now
        if SHORTFALL:
            tile_shortfall = -tl.sum(difference * exponentials, axis=1)
            shortfall = weight_before * (shortfall + before * others)
            shortfall += weight_now * (tile_shortfall + now * tile_others)
            shortfall += (before + now) * lower_top
        if SQUARES:
            tile_squares = more_tops + tl.sum(exponentials * exponentials, axis=1)
            squares = weight_before * weight_before * squares + lower_top * lower_top
            squares += weight_now * weight_now * tile_squares
        others = weight_before * others + weight_now * tile_others + lower_top
        maximum = new_maximum

    number = splits.to(tl.int64) * n_rows  # of values of one kind
    parts_ptrs = parts_ptr + split.to(tl.int64) * n_rows + row
    tl.store(parts_ptrs, maximum, mask=row_exists)
    if SECOND:
        tl.store(parts_ptrs + number, second, mask=row_exists)
    tl.store(parts_ptrs + 2 * number, others, mask=row_exists)
    if SHORTFALL:
        tl.store(parts_ptrs + 3 * number, shortfall, mask=row_exists)
    if SQUARES:
        tl.store(parts_ptrs + 4 * number, squares, mask=row_exists)
