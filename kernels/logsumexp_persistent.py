"""Logsumexp of `hidden @ weight.T` on devices that copy tiles by themselves (TMA).

As `logsumexp`, with two differences. Tiles arrive through tensor descriptors, so no thread spends
registers or time on addresses. And there is one program for each multiprocessor, which takes one
piece of work after the other: while it folds a tile of logits, nothing has to be launched anew.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import dot
from .launch import multiprocessors, on, persistent_config
from .online import LOWEST, fold_logits
from .projection import GROUP_ROWS
from .transform import Transform, transform_arguments, transform_logits

MAX_SPLITS = 256


def persistent_logsumexp(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    target_logit: Tensor,  # (n,) float32, written where the label is in [0, V); empty without
    transform: Transform,
) -> Tensor:  # (splits, n) float32
    """Compute the logsumexp of every split of the vocabulary, labels left out, and their logits."""
    (n_rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    config = persistent_config(hidden.device)
    programs = multiprocessors(hidden.device)
    row_blocks = triton.cdiv(n_rows, config.block_rows)
    tiles = triton.cdiv(vocab_size, config.block_vocab)
    tiles_per_split = even_split(row_blocks, tiles, programs)
    splits = triton.cdiv(tiles, tiles_per_split)
    lse = hidden.new_empty((splits, n_rows), dtype=torch.float32)
    with on(hidden.device):
        # Programs write their descriptors to memory that Triton asks for here. From PyTorch's
        # allocator it is also right under CUDA graphs, where a plain one would be reused.
        triton.set_allocator(_allocate)
        _persistent_logsumexp_kernel[(min(programs, row_blocks * splits),)](
            hidden,
            weight,
            None if bias is None else bias.contiguous(),
            None if labels is None else labels.contiguous(),
            target_logit,
            lse,
            n_rows,
            vocab_size,
            hidden_size,
            splits,
            tiles_per_split,
            hidden.stride(0),
            weight.stride(0),
            **transform_arguments(transform),
            GROUP_ROWS=GROUP_ROWS,
            BLOCK_ROWS=config.block_rows,
            BLOCK_VOCAB=config.block_vocab,
            BLOCK_HIDDEN=config.block_hidden,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return lse


@lru_cache
def even_split(row_blocks: int, tiles: int, programs: int) -> int:
    """Tiles of the vocabulary a piece of work, so that the busiest program has the fewest tiles.

    All pieces are alike, so that a program's share is a whole number of them: with 32 row blocks
    and 132 programs 33 splits make 8 pieces each, where 32 would leave every 33rd program idle.
    """

    def busiest(splits: int) -> int:
        return -(-row_blocks * splits // programs) * -(-tiles // splits)

    return -(-tiles // min(range(1, min(tiles, MAX_SPLITS) + 1), key=busiest))


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


# These vary from batch to batch and need no code of their own; sizes and strides are worth theirs.
@triton.jit(do_not_specialize=["n_rows", "splits", "tiles_per_split"])
def _persistent_logsumexp_kernel(
    hidden_ptr,  # (n, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or None
    labels_ptr,  # (n,) or None
    target_logit_ptr,  # (n,)
    lse_ptr,  # (splits, n)
    n_rows,
    vocab_size,
    hidden_size,
    splits,
    tiles_per_split,
    hidden_stride_row,
    weight_stride_row,
    logit_scale,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One program after another takes a block of rows against one split of the vocabulary."""
    # What a tile has beyond the matrix reads as 0.
    hidden = tl.make_tensor_descriptor(
        hidden_ptr, [n_rows, hidden_size], [hidden_stride_row, 1], [BLOCK_ROWS, BLOCK_HIDDEN]
    )
    weight = tl.make_tensor_descriptor(
        weight_ptr, [vocab_size, hidden_size], [weight_stride_row, 1], [BLOCK_VOCAB, BLOCK_HIDDEN]
    )
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    for piece in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        # Pieces that run together: GROUP_ROWS blocks of rows, and for these every split in turn.
        first_block = piece // (GROUP_ROWS * splits) * GROUP_ROWS
        group_rows = tl.minimum(row_blocks - first_block, GROUP_ROWS)
        in_group = piece % (GROUP_ROWS * splits)
        first_row = (first_block + in_group % group_rows) * BLOCK_ROWS
        split = in_group // group_rows
        row = first_row + tl.arange(0, BLOCK_ROWS)
        row_exists = row < n_rows
        label = -1
        if labels_ptr is not None:
            label = tl.load(labels_ptr + row, mask=row_exists, other=-1)
            # Comparing 32-bit integers is cheaper; -1 is no column.
            label = tl.where((label >= 0) & (label < vocab_size), label, -1).to(tl.int32)

        maximum = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
        sum_exp = tl.zeros((BLOCK_ROWS,), tl.float32)
        target_logit = tl.zeros((BLOCK_ROWS,), tl.float32)
        first_tile = split * tiles_per_split
        end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab_size, BLOCK_VOCAB))
        for tile in range(first_tile, end_tile):
            first_column = tile * BLOCK_VOCAB
            x = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
            for start in range(0, hidden_size, BLOCK_HIDDEN):
                a = hidden.load([first_row, start])
                b = weight.load([first_column, start])
                x = dot(a, b.T, x)
            if bias_ptr is not None:
                column = first_column + tl.arange(0, BLOCK_VOCAB)
                bias = tl.load(bias_ptr + column, mask=column < vocab_size, other=0.0)
                x += bias.to(tl.float32)[None, :]
            z, _ = transform_logits(x, logit_scale, softcap, temperature, HAS_SOFTCAP)
            maximum, sum_exp, target_logit = fold_logits(
                z, first_column, vocab_size, label, maximum, sum_exp, target_logit,
                labels_ptr is not None, BLOCK_VOCAB,
            )  # fmt: skip

        lse = maximum + tl.log(sum_exp)
        tl.store(lse_ptr + split.to(tl.int64) * n_rows + row, lse, mask=row_exists)
        if labels_ptr is not None:
            # One split holds the label; nobody writes where none does.
            holds_label = (label >= first_tile * BLOCK_VOCAB) & (label < end_tile * BLOCK_VOCAB)
            tl.store(target_logit_ptr + row, target_logit, mask=row_exists & holds_label)
