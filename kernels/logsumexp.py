"""What a logsumexp of every row of `hidden @ weight.T` is made of, with no buffer of logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import projection_config, reads_through_descriptors
from .logsumexp_persistent import persistent_logsumexp
from .numerics import LOWEST, Transform
from .projection import (
    fold_projection,
    label_logits,
    launch_projection,
    load_labels,
    project_tile,
    rows_of_program,
    store_split,
)


def projection_logsumexp(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (n,) int64
    rows: Tensor | None,  # (n,) int64
    transform: Transform,
) -> tuple[Tensor, Tensor, Tensor]:  # (n,) float32 each
    """Compute `reference`, `sum_exp` and `target_logit` of every row.

    `z = T(hidden[rows] @ weight.T + bias)`; `target_logit = z[label]`, and of all other logits
    `reference` is the largest and `sum_exp = sum(exp(z - reference))`. They stay apart, as adding
    `log(sum_exp)` to a large reference would cost its digits. `rows=None` is every row. A label
    outside `[0, V)` excludes nothing and its `target_logit` is NaN. With `labels=None`
    `target_logit` is empty. Where every logit is -inf, the reference is the lowest finite number.
    """
    n_rows = hidden.shape[0] if rows is None else rows.shape[0]
    if n_rows == 0:
        nothing = label_logits(hidden, None)
        return nothing, nothing, nothing
    if reads_through_descriptors(hidden, weight, n_rows):
        if rows is not None:  # gathered: a descriptor reads rows that lie side by side
            hidden = hidden.index_select(0, rows)
        target_logit, parts = persistent_logsumexp(hidden, weight, bias, labels, transform)
    else:
        target_logit, parts = launch_projection(
            _projection_logsumexp_kernel, hidden, weight, bias, labels, rows, transform,
            projection_config(hidden, weight, n_rows), numbers=2,
        )  # fmt: skip
    maximum, sum_exp = parts
    reference = maximum.amax(0)
    return reference, (sum_exp * torch.exp(maximum - reference)).sum(0), target_logit


# These vary from batch to batch and need no code of their own; sizes and strides are worth theirs.
@triton.jit(do_not_specialize=["n_rows", "splits", "tiles_per_split"])
def _projection_logsumexp_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or None
    labels_ptr,  # (n,) or None
    rows_ptr,  # (n,) or None
    target_logit_ptr,  # (n,)
    parts_ptr,  # (2, splits, n)
    n_rows, vocab_size, hidden_size, splits, tiles_per_split,
    hidden_stride_row, hidden_stride_col, weight_stride_row, weight_stride_col,
    inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr, EVEN_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the vocabulary."""
    split, row, row_exists, hidden_rows = rows_of_program(
        hidden_ptr, rows_ptr, n_rows, splits, hidden_stride_row, GROUP_ROWS, BLOCK_ROWS
    )
    label = -1
    if labels_ptr is not None:
        label = load_labels(labels_ptr, row, vocab_size)

    maximum = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK_ROWS,), tl.float32)
    target_logit = tl.zeros((BLOCK_ROWS,), tl.float32)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab_size, BLOCK_VOCAB))
    for tile in range(first_tile, end_tile):
        x = project_tile(
            hidden_rows, weight_ptr, tile, vocab_size, hidden_size,
            hidden_stride_col, weight_stride_row, weight_stride_col,
            EVEN_HIDDEN, BLOCK_ROWS, BLOCK_VOCAB, BLOCK_HIDDEN,
        )  # fmt: skip
        maximum, sum_exp, target_logit = fold_projection(
            x, tile * BLOCK_VOCAB, vocab_size, bias_ptr, label, maximum, sum_exp, target_logit,
            inner, outer, labels_ptr is not None, HAS_SOFTCAP, HAS_FACTOR, BLOCK_VOCAB,
        )  # fmt: skip

    store_split(
        parts_ptr, target_logit_ptr, split, splits, row, row_exists, n_rows,
        first_tile * BLOCK_VOCAB, end_tile * BLOCK_VOCAB, label, maximum, sum_exp, target_logit,
        labels_ptr is not None,
    )  # fmt: skip
