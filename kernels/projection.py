"""What kernels built on `hidden @ weight.T` share: the order of their programs, and one product."""

from typing import NamedTuple

import triton
import triton.language as tl

from .dot import dot

# The vocabulary is split until there are enough programs to fill any device, and at least so often
# that the programs of one wave form a square of row blocks and splits that share their operands.
PROGRAMS = 512
MIN_SPLITS = 16
GROUP_ROWS = 16


class Split(NamedTuple):
    """How many programs there are, and what each of them reads."""

    row_blocks: int
    splits: int
    tiles_per_split: int


def split_vocabulary(n_rows: int, vocab_size: int, block_rows: int, block_vocab: int) -> Split:
    """Share the tiles of the vocabulary out among programs."""
    row_blocks = triton.cdiv(n_rows, block_rows)
    tiles = triton.cdiv(vocab_size, block_vocab)
    splits = min(tiles, max(MIN_SPLITS, triton.cdiv(PROGRAMS, row_blocks)))
    tiles_per_split = triton.cdiv(tiles, splits)
    return Split(row_blocks, triton.cdiv(tiles, tiles_per_split), tiles_per_split)


@triton.jit
def row_block_and_split(n_rows, splits, GROUP_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Block of rows and split of this program."""
    return row_block_and_split_of(tl.program_id(0), n_rows, splits, GROUP_ROWS, BLOCK_ROWS)


@triton.jit
def row_block_and_split_of(
    piece, n_rows, splits, GROUP_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Block of rows and split of a piece of work.

    Pieces that run together: GROUP_ROWS blocks of rows, and for these every split in turn.
    """
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    first_block = piece // (GROUP_ROWS * splits) * GROUP_ROWS
    group_rows = tl.minimum(row_blocks - first_block, GROUP_ROWS)
    in_group = piece % (GROUP_ROWS * splits)
    return first_block + in_group % group_rows, in_group // group_rows


@triton.jit
def project_tile(
    hidden_rows,  # (BLOCK_ROWS, 1) pointers to the start of each row
    weight_rows,  # (1, BLOCK_VOCAB) pointers to the start of each column
    hidden_size,
    hidden_stride_col,
    weight_stride_col,
    EVEN_HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One tile (BLOCK_ROWS, BLOCK_VOCAB) float32 of the projection, without bias."""
    x = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
    for start in range(0, hidden_size, BLOCK_HIDDEN):
        k = start + tl.arange(0, BLOCK_HIDDEN)
        # 64 bits: a transposed operand has a stride of its other size.
        hidden_ptrs = hidden_rows + (k.to(tl.int64) * hidden_stride_col)[None, :]
        weight_ptrs = weight_rows + (k.to(tl.int64) * weight_stride_col)[:, None]
        if EVEN_HIDDEN:
            a = tl.load(hidden_ptrs)
            b = tl.load(weight_ptrs)
        else:
            a = tl.load(hidden_ptrs, mask=(k < hidden_size)[None, :], other=0.0)
            b = tl.load(weight_ptrs, mask=(k < hidden_size)[:, None], other=0.0)
        x = dot(a, b, x)
    return x
