"""A logsumexp that takes the vocabulary tile by tile, the label's column kept out of it."""

import triton
import triton.language as tl

# A finite start keeps `maximum - maximum` from being NaN while every logit so far is -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def fold_logits(
    z,  # (ROWS, COLUMNS) float32 logits
    first_column,  # of the tile
    vocab_size,
    label,  # (ROWS,) int32, -1 for none; not read without HAS_LABELS
    maximum,  # (ROWS,) starts at LOWEST
    sum_exp,  # (ROWS,) starts at 0, in units of exp(maximum)
    target_logit,  # (ROWS,) starts at 0
    HAS_LABELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The last three, with this tile folded into them; columns past the vocabulary do not count."""
    column = first_column + tl.arange(0, COLUMNS)
    z = tl.where((column < vocab_size)[None, :], z, -float("inf"))
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
