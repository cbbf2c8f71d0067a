"""Logsumexp and label logit of every row of `hidden @ weight.T`, with no buffer of logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import dot
from .launch import on, projection_config
from .transform import Transform, transform_arguments, transform_logits

# The vocabulary is split until there are enough programs to fill any device, and at least so often
# that the programs of one wave form a square of row blocks and splits that share their operands.
PROGRAMS = 512
MIN_SPLITS = 16
GROUP_ROWS = 16


def projection_logsumexp(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    rows: Tensor | None,  # (n,) int64
    transform: Transform,
) -> tuple[Tensor, Tensor]:  # (n,) float32, (n,) float32
    """Compute the label's logit, and the logsumexp of all other logits.

    `z = T(hidden[rows] @ weight.T + bias)`; returns `target_logit = z[label]` and
    `lse_other = logsumexp(z[j], j != label)`: `logps = logsigmoid(target_logit - lse_other)` is
    exact near zero. `rows=None` is every row. A label outside `[0, V)` excludes nothing and its
    `target_logit` is NaN. With `labels=None` `target_logit` is empty and `lse_other` the whole
    logsumexp.
    """
    n_rows = hidden.shape[0] if rows is None else rows.shape[0]
    vocab_size, hidden_size = weight.shape
    target_logit = hidden.new_full(
        (0 if labels is None else n_rows,), float("nan"), dtype=torch.float32
    )
    if n_rows == 0:
        return target_logit, target_logit.new_empty(0)

    config = projection_config(hidden, weight, n_rows)
    row_blocks = triton.cdiv(n_rows, config.block_rows)
    tiles = triton.cdiv(vocab_size, config.block_vocab)
    splits = min(tiles, max(MIN_SPLITS, triton.cdiv(PROGRAMS, row_blocks)))
    tiles_per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, tiles_per_split)
    lse = target_logit.new_empty((splits, n_rows))
    with on(hidden.device):
        _projection_logsumexp_kernel[(row_blocks * splits,)](
            hidden,
            weight,
            None if bias is None else bias.contiguous(),
            None if labels is None else labels.contiguous(),
            None if rows is None else rows.contiguous(),
            target_logit,
            lse,
            n_rows,
            vocab_size,
            hidden_size,
            splits,
            tiles_per_split,
            hidden.stride(0),
            hidden.stride(1),
            weight.stride(0),
            weight.stride(1),
            **transform_arguments(transform),
            EVEN_HIDDEN=hidden_size % config.block_hidden == 0,
            GROUP_ROWS=GROUP_ROWS,
            BLOCK_ROWS=config.block_rows,
            BLOCK_VOCAB=config.block_vocab,
            BLOCK_HIDDEN=config.block_hidden,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return target_logit, torch.logsumexp(lse, dim=0)


# These vary from batch to batch and need no code of their own; sizes and strides are worth theirs.
@triton.jit(do_not_specialize=["n_rows", "splits", "tiles_per_split"])
def _projection_logsumexp_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or None
    labels_ptr,  # (n,) or None
    rows_ptr,  # (n,) or None
    target_logit_ptr,  # (n,)
    lse_ptr,  # (splits, n)
    n_rows,
    vocab_size,
    hidden_size,
    splits,
    tiles_per_split,
    hidden_stride_row,
    hidden_stride_col,
    weight_stride_row,
    weight_stride_col,
    logit_scale,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One block of rows against one split of the vocabulary."""
    # Programs that run together: GROUP_ROWS blocks of rows, and for these every split in turn.
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    first_block = tl.program_id(0) // (GROUP_ROWS * splits) * GROUP_ROWS
    group_rows = tl.minimum(row_blocks - first_block, GROUP_ROWS)
    in_group = tl.program_id(0) % (GROUP_ROWS * splits)
    split = in_group // group_rows
    row = (first_block + in_group % group_rows) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_exists = row < n_rows
    # Rows and columns past the end read the last one: what comes of them is dropped later, and the
    # loads in the inner loop need no mask.
    row = tl.minimum(row, n_rows - 1)
    source = row.to(tl.int64)
    if rows_ptr is not None:
        source = tl.load(rows_ptr + row).to(tl.int64)
    hidden_rows = hidden_ptr + source[:, None] * hidden_stride_row
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        # Comparing 32-bit integers is cheaper; -1 is no column.
        label = tl.where((label >= 0) & (label < vocab_size), label, -1).to(tl.int32)

    # A finite start keeps `maximum - maximum` from being NaN while every logit so far is -inf.
    maximum = tl.full((BLOCK_ROWS,), -3.4028234663852886e38, tl.float32)
    sum_exp = tl.zeros((BLOCK_ROWS,), tl.float32)
    target_logit = tl.zeros((BLOCK_ROWS,), tl.float32)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab_size, BLOCK_VOCAB))
    for tile in range(first_tile, end_tile):
        column = tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        existing = tl.minimum(column, vocab_size - 1)
        weight_rows = weight_ptr + existing.to(tl.int64)[None, :] * weight_stride_row
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
        if bias_ptr is not None:
            x += tl.load(bias_ptr + existing).to(tl.float32)[None, :]
        z, _ = transform_logits(x, logit_scale, softcap, temperature, HAS_SOFTCAP)

        z = tl.where((column < vocab_size)[None, :], z, -float("inf"))
        if labels_ptr is not None:
            in_tile = (label >= tile * BLOCK_VOCAB) & (label < (tile + 1) * BLOCK_VOCAB)
            if tl.max(in_tile.to(tl.int32), axis=0) == 1:
                is_label = column[None, :] == label[:, None]
                target_logit += tl.sum(tl.where(is_label, z, 0.0), axis=1)
                z = tl.where(is_label, -float("inf"), z)
        new_maximum = tl.maximum(maximum, tl.max(z, axis=1))
        sum_exp *= tl.exp(maximum - new_maximum)
        sum_exp += tl.sum(tl.exp(z - new_maximum[:, None]), axis=1)
        maximum = new_maximum

    lse = maximum + tl.log(sum_exp)
    tl.store(lse_ptr + split.to(tl.int64) * n_rows + row, lse, mask=row_exists)
    if labels_ptr is not None:
        # One split holds the label; nobody writes where none does.
        holds_label = (label >= first_tile * BLOCK_VOCAB) & (label < end_tile * BLOCK_VOCAB)
        tl.store(target_logit_ptr + row, target_logit, mask=row_exists & holds_label)
