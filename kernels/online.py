"""A logsumexp that takes the vocabulary tile by tile, the label's column kept out of it."""

import triton
import triton.language as tl

from .projection import tile_logits


@triton.jit
def fold_projection(
    x,  # (ROWS, COLUMNS) float32 projections, without bias
    first_column,  # of the tile
    vocab_size,
    bias_ptr,  # (V,) or None
    label,  # (ROWS,) int32, -1 for none; not read without HAS_LABELS
    maximum,  # (ROWS,) starts at LOWEST
    sum_exp,  # (ROWS,) starts at 0, in units of exp(maximum)
    target_logit,  # (ROWS,) starts at 0
    logit_scale,
    softcap,
    temperature,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Fold the logits of one tile into maximum, sum and the label's logit.

    Columns past the vocabulary do not count.
    """
    column, z = tile_logits(
        x, first_column, vocab_size, bias_ptr, logit_scale, softcap, temperature,
        HAS_SOFTCAP, COLUMNS,
    )  # fmt: skip
    if HAS_LABELS:
        in_tile = (label >= first_column) & (label < first_column + COLUMNS)
        if tl.max(in_tile.to(tl.int32), axis=0) == 1:
            is_label = column[None, :] == label[:, None]
            target_logit += tl.sum(tl.where(is_label, z, 0.0), axis=1)
            z = tl.where(is_label, -float("inf"), z)
    new_maximum = tl.maximum(maximum, tl.max(z, axis=1))
    sum_exp *= tl.exp(maximum - new_maximum)
    sum_exp += tl.sum(tl.exp(z - new_maximum[:, None]), axis=1)
    return new_maximum, sum_exp, target_logit


@triton.jit
def store_split(
    lse_ptr,  # (splits, n)
    target_logit_ptr,  # (n,)
    split,
    row,  # (ROWS,)
    row_exists,  # (ROWS,)
    n_rows,
    first_column,  # of the split
    end_column,
    label,  # (ROWS,) as for `fold_projection`, like the rest
    maximum,
    sum_exp,
    target_logit,
    HAS_LABELS: tl.constexpr,
):
    """Write what `fold_projection` made of one split; of labels only those that the split holds."""
    lse = maximum + tl.log(sum_exp)
    tl.store(lse_ptr + split.to(tl.int64) * n_rows + row, lse, mask=row_exists)
    if HAS_LABELS:
        # One split holds the label; nobody writes where none does.
        holds_label = (label >= first_column) & (label < end_column)
        tl.store(target_logit_ptr + row, target_logit, mask=row_exists & holds_label)
