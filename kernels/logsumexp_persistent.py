"""The same parts of a logsumexp, on devices that copy tiles by themselves (TMA).

As `logsumexp`, with two differences. Tiles arrive through tensor descriptors, so no thread spends
registers or time on addresses. And there is one program for each multiprocessor, which takes one
piece of work after the other in a single loop: while it folds a tile of logits, the operands of the
next one are on their way.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import PERSISTENT_CONFIG, compile_options, multiprocessors, on
from .numerics import LOWEST, Transform, transform_arguments
from .projection import (
    GROUP_ROWS,
    dot,
    fold_projection,
    label_logits,
    load_labels,
    row_block_and_split,
    store_split,
)

MAX_SPLITS = 256


def persistent_logsumexp(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    transform: Transform,
) -> tuple[Tensor, Tensor]:  # (n,) float32 or empty, (2, splits, n) float32
    """Compute the labels' logits, and maximum and sum of each split of the vocabulary without them.

    The sum is that of `exp(z - maximum)`.
    """
    (n_rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    config = PERSISTENT_CONFIG
    programs = multiprocessors(hidden.device)
    row_blocks = triton.cdiv(n_rows, config.block_rows)
    tiles = triton.cdiv(vocab_size, config.block_vocab)
    tiles_per_split = even_split(row_blocks, tiles, programs)
    splits = triton.cdiv(tiles, tiles_per_split)
    target_logit = label_logits(hidden, labels)
    parts = target_logit.new_empty((2, splits, n_rows))
    # The host makes the descriptors and hands them over as arguments, which a CUDA graph keeps.
    # Descriptors made by the kernel would need memory, from an allocator that Triton has one of in
    # each thread: users may have set theirs, and autograd's threads have none.
    operands = (
        TensorDescriptor.from_tensor(matrix, [block, config.block_hidden])
        for matrix, block in ((hidden, config.block_rows), (weight, config.block_vocab))
    )
    with on(hidden.device):
        _persistent_logsumexp_kernel[(min(programs, row_blocks * splits),)](
            *operands,
            None if bias is None else bias.contiguous(),
            None if labels is None else labels.contiguous(),
            target_logit,
            parts,
            n_rows,
            vocab_size,
            hidden_size,
            splits,
            tiles_per_split,
            **transform_arguments(transform),
            GROUP_ROWS=GROUP_ROWS,
            BLOCK_ROWS=config.block_rows,
            BLOCK_VOCAB=config.block_vocab,
            BLOCK_HIDDEN=config.block_hidden,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **compile_options(),
        )
    return target_logit, parts


@lru_cache
def even_split(row_blocks: int, tiles: int, programs: int) -> int:
    """Tiles of the vocabulary a piece of work, so that the busiest program has the fewest tiles.

    All pieces are alike, so that a program's share is a whole number of them: with 32 row blocks
    and 132 programs 33 splits make 8 pieces each, where 32 would leave every 33rd program idle.
    """

    def busiest(splits: int) -> int:
        return -(-row_blocks * splits // programs) * -(-tiles // splits)

    return -(-tiles // min(range(1, min(tiles, MAX_SPLITS) + 1), key=busiest))


# These vary from batch to batch and need no code of their own; sizes and strides are worth theirs.
@triton.jit(do_not_specialize=["n_rows", "splits", "tiles_per_split"])
def _persistent_logsumexp_kernel(
    hidden,  # (n, H) descriptor of tiles (BLOCK_ROWS, BLOCK_HIDDEN), 0 beyond the matrix
    weight,  # (V, H) descriptor of tiles (BLOCK_VOCAB, BLOCK_HIDDEN), 0 beyond the matrix
    bias_ptr,  # (V,) or None
    labels_ptr,  # (n,) or None
    target_logit_ptr,  # (n,)
    parts_ptr,  # (2, splits, n)
    n_rows, vocab_size, hidden_size, splits, tiles_per_split, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """One program after another takes a block of rows against one split of the vocabulary."""
    pieces = tl.cdiv(n_rows, BLOCK_ROWS) * splits
    own_pieces = tl.cdiv(pieces - tl.program_id(0), tl.num_programs(0))
    steps = tl.cdiv(hidden_size, BLOCK_HIDDEN)
    step = steps - 1
    row_block, split = row_block_and_split(tl.program_id(0), n_rows, splits, GROUP_ROWS, BLOCK_ROWS)
    tile = split * tiles_per_split
    maximum = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK_ROWS,), tl.float32)
    target_logit = tl.zeros((BLOCK_ROWS,), tl.float32)
    x = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
    # One loop over the steps of all tiles of all pieces: the compiler overlaps copies and products
    # within a loop, not across its ends.
    for index in range(0, own_pieces * tiles_per_split * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile_of_program = index // steps
            piece = tl.program_id(0) + tile_of_program // tiles_per_split * tl.num_programs(0)
            row_block, split = row_block_and_split(piece, n_rows, splits, GROUP_ROWS, BLOCK_ROWS)
            tile = split * tiles_per_split + tile_of_program % tiles_per_split
        a = hidden.load([row_block * BLOCK_ROWS, step * BLOCK_HIDDEN])
        b = weight.load([tile * BLOCK_VOCAB, step * BLOCK_HIDDEN])
        x = dot(a, b.T, x)
        if step == steps - 1:
            row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            row_exists = row < n_rows
            row = tl.minimum(row, n_rows - 1)
            label = -1
            if labels_ptr is not None:
                label = load_labels(labels_ptr, row, vocab_size)
            left, right = _halves(x, BLOCK_ROWS, BLOCK_VOCAB)
            for half in tl.static_range(2):
                maximum, sum_exp, target_logit = _fold_halves(
                    left if half == 0 else right, tile * BLOCK_VOCAB + half * (BLOCK_VOCAB // 2),
                    vocab_size, bias_ptr, label, maximum, sum_exp, target_logit,
                    inner, outer,
                    labels_ptr is not None, HAS_SOFTCAP, HAS_FACTOR, BLOCK_ROWS, BLOCK_VOCAB // 2,
                )  # fmt: skip
            x = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
            if (tile + 1) % tiles_per_split == 0:
                store_split(
                    parts_ptr, target_logit_ptr, split, splits, row, row_exists, n_rows,
                    split * tiles_per_split * BLOCK_VOCAB, (tile + 1) * BLOCK_VOCAB,
                    label, maximum, sum_exp, target_logit, labels_ptr is not None,
                )  # fmt: skip
                maximum = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
                sum_exp = tl.zeros((BLOCK_ROWS,), tl.float32)
                target_logit = tl.zeros((BLOCK_ROWS,), tl.float32)


@triton.jit
def _fold_halves(
    x, first_column, vocab_size, bias_ptr, label, maximum, sum_exp, target_logit,
    inner, outer,
    HAS_LABELS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `fold_projection`, for one half of the columns after the other: half the registers."""
    left, right = _halves(x, ROWS, COLUMNS)
    for half in tl.static_range(2):
        maximum, sum_exp, target_logit = fold_projection(
            left if half == 0 else right, first_column + half * (COLUMNS // 2), vocab_size,
            bias_ptr, label, maximum, sum_exp, target_logit, inner, outer,
            HAS_LABELS, HAS_SOFTCAP, HAS_FACTOR, COLUMNS // 2,
        )  # fmt: skip
    return maximum, sum_exp, target_logit


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half (ROWS, COLUMNS / 2) of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
