"""What kernels built on `hidden @ weight.T` share: their launch, their order, and one tile."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ProjectionConfig, compile_options, on
from .numerics import Transform, exp, transform_arguments, transform_logits

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
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


def label_logits(hidden: Tensor, labels: Tensor | None) -> Tensor:
    """Where kernels write the label's logit (n,), NaN until then; empty without labels."""
    count = 0 if labels is None else labels.shape[0]
    return hidden.new_full((count,), float("nan"), dtype=torch.float32)


def launch_projection(
    kernel: Any,
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    rows: Tensor | None,  # (n,) int64
    transform: Transform,
    config: ProjectionConfig,
    *,
    numbers: int,
    **constants: bool,
) -> tuple[Tensor, Tensor]:  # (n,) float32 or empty, (numbers, splits, n) float32
    """Run `kernel` for every block of rows and every split of the vocabulary.

    Returns the labels' logits and the numbers of each split.
    """
    n_rows = hidden.shape[0] if rows is None else rows.shape[0]
    vocab_size, hidden_size = weight.shape
    row_blocks, splits, tiles_per_split = split_vocabulary(
        n_rows, vocab_size, config.block_rows, config.block_vocab
    )
    target_logit = label_logits(hidden, labels)
    parts = target_logit.new_empty((numbers, splits, n_rows))
    if constants:  # they say which of the numbers a kernel writes
        parts.zero_()
    with on(hidden.device):
        kernel[(row_blocks * splits,)](
            hidden,
            weight,
            None if bias is None else bias.contiguous(),
            None if labels is None else labels.contiguous(),
            None if rows is None else rows.contiguous(),
            target_logit,
            parts,
            n_rows,
            vocab_size,
            hidden_size,
            splits,
            tiles_per_split,
            *hidden.stride(),
            *weight.stride(),
            **transform_arguments(transform),
            **constants,
            EVEN_HIDDEN=hidden_size % config.block_hidden == 0,
            GROUP_ROWS=GROUP_ROWS,
            BLOCK_ROWS=config.block_rows,
            BLOCK_VOCAB=config.block_vocab,
            BLOCK_HIDDEN=config.block_hidden,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **compile_options(many_registers=hidden.dtype == torch.float32),
        )
    return target_logit, parts


@triton.jit
def row_block_and_split(piece, n_rows, splits, GROUP_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Block of rows and split of a piece of work.

    Pieces that run together: GROUP_ROWS blocks of rows, and for these every split in turn.
    """
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    first_block = piece // (GROUP_ROWS * splits) * GROUP_ROWS
    group_rows = tl.minimum(row_blocks - first_block, GROUP_ROWS)
    in_group = piece % (GROUP_ROWS * splits)
    return first_block + in_group % group_rows, in_group // group_rows


@triton.jit
def rows_of_program(
    hidden_ptr,  # (N, H)
    rows_ptr,  # (n,) or None
    n_rows, splits, hidden_stride_row,
    GROUP_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Split, rows, whether these exist, and pointers to their hidden states (BLOCK_ROWS, 1).

    Rows past the end are the last one: what comes of them is dropped later, and the loads in the
    inner loop need no mask.
    """
    row_block, split = row_block_and_split(tl.program_id(0), n_rows, splits, GROUP_ROWS, BLOCK_ROWS)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_exists = row < n_rows
    row = tl.minimum(row, n_rows - 1)
    source = row.to(tl.int64)
    if rows_ptr is not None:
        source = tl.load(rows_ptr + row).to(tl.int64)
    return split, row, row_exists, hidden_ptr + source[:, None] * hidden_stride_row


@triton.jit
def project_tile(
    hidden_rows,  # (BLOCK_ROWS, 1) pointers to the start of each row
    weight_ptr,  # (V, H)
    tile,  # which columns: tile * BLOCK_VOCAB and on
    vocab_size, hidden_size, hidden_stride_col, weight_stride_row, weight_stride_col,
    EVEN_HIDDEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_ROWS, BLOCK_VOCAB) float32 of the projection, without bias.

    Columns past the end are the last one.
    """
    column = tl.minimum(tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB), vocab_size - 1)
    weight_rows = weight_ptr + column.to(tl.int64)[None, :] * weight_stride_row
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


@triton.jit
def dot(a, b, accumulator):
    """`accumulator + a @ b`: (M, K), (K, N), (M, N) float32 -> (M, N) float32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as raw 16-bit integers and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # "ieee" concerns float32 operands alone: without it they would be rounded to tf32.
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def load_labels(labels_ptr, row, vocab_size):
    """Labels of rows as 32-bit integers, which compare faster; -1, no column, for one outside."""
    label = tl.load(labels_ptr + row)
    return tl.where((label >= 0) & (label < vocab_size), label, -1).to(tl.int32)


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
    inner, outer,
    HAS_LABELS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fold the logits of one tile into maximum, sum and the label's logit.

    Columns past the vocabulary do not count.
    """
    column = first_column + tl.arange(0, COLUMNS)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < vocab_size, other=0.0)
        x += bias.to(tl.float32)[None, :]
    z, _ = transform_logits(x, inner, outer, HAS_SOFTCAP, HAS_FACTOR)
    z = tl.where((column < vocab_size)[None, :], z, -float("inf"))
    if HAS_LABELS:
        in_tile = (label >= first_column) & (label < first_column + COLUMNS)
        if tl.max(in_tile.to(tl.int32), axis=0) == 1:
            is_label = column[None, :] == label[:, None]
            target_logit += tl.sum(tl.where(is_label, z, 0.0), axis=1)
            z = tl.where(is_label, -float("inf"), z)
    new_maximum = tl.maximum(maximum, tl.max(z, axis=1))
    sum_exp *= exp(maximum - new_maximum)
    sum_exp += tl.sum(exp(z - new_maximum[:, None]), axis=1)
    return new_maximum, sum_exp, target_logit


@triton.jit
def store_split(
    parts_ptr,  # (2, splits, n)
    target_logit_ptr,  # (n,)
    split,
    splits,
    row,  # (ROWS,)
    row_exists,  # (ROWS,)
    n_rows,
    first_column,  # of the split
    end_column,
    label,  # (ROWS,) as for `fold_projection`, like the rest
    maximum, sum_exp, target_logit,
    HAS_LABELS: tl.constexpr,
):  # fmt: skip
    """Write what `fold_projection` made of one split; of labels only those that the split holds."""
    parts_ptrs = parts_ptr + split.to(tl.int64) * n_rows + row
    tl.store(parts_ptrs, maximum, mask=row_exists)
    tl.store(parts_ptrs + splits.to(tl.int64) * n_rows, sum_exp, mask=row_exists)
    if HAS_LABELS:
        # One split holds the label; nobody writes where none does.
        holds_label = (label >= first_column) & (label < end_column)
        tl.store(target_logit_ptr + row, target_logit, mask=row_exists & holds_label)
