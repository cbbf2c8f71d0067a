"""Gradients of the hidden states and of the head, once the incoming gradient is known."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.ops.backend import multiply, tile_functions
from fastpref.ops.operands import Logits
from fastpref.ops.tiling import TileCache, carve, tile_grid
from fastpref.ops.torch_tiles import write_at_labels


def gradients(
    logits: Logits,
    logps: Tensor,  # (n,), empty without labels
    lse: Tensor,  # (n,)
    probability_coefficients: Tensor,  # (n,)
    label_coefficients: Tensor,  # (n,)
    *,
    cache: Tensor,  # uint8, flat, as `statistics` left it
    hidden_gradient: Tensor | None,  # (n, H) in the dtype of statistics, written
    weight_gradient: Tensor | None,  # (V, H), written
    bias_gradient: Tensor | None,  # (V,), written
) -> None:
    """Write the gradients that are wanted: a matrix product each, one more for what is not cached.

    The vocabulary is the outer loop, so each stretch of the weight's gradient is finished at once
    and summed in float32 whatever its dtype.
    """
    # Finite, so that no difference to it is NaN in a row whose every logit is -inf.
    lse = lse.clamp_min(torch.finfo(lse.dtype).min)
    gradient_tile = tile_functions(logits.hidden).gradient_tile
    logits = logits.in_dtype_of_products()
    hidden, weight, transform = logits.hidden, logits.weight, logits.transform
    grid = tile_grid(*logits.shape(), lse)
    scratch = grid.buffer(lse)
    operands = scratch if scratch.dtype == hidden.dtype else grid.buffer(hidden)
    tiles = TileCache(cache, grid, hidden.dtype, scratch.dtype)
    # Cached tiles have their slope in them, all but the label's.
    label_gradients = label_coefficients * transform.slope(logps + lse if len(logps) else lse)
    for columns in grid.column_blocks():
        weight_total = _total(weight_gradient, columns, lse.dtype)
        bias_total = _total(bias_gradient, columns, lse.dtype)
        for rows in grid.row_blocks():
            gradient = carve(operands, rows.stop - rows.start, columns.stop - columns.start)
            row_labels = logits.labels_of(rows)
            kept = tiles.tile(rows, columns)
            if kept is None:
                gradient_tile(
                    logits.project(rows, columns, scratch),
                    row_labels, columns.start, transform, lse[rows],
                    probability_coefficients[rows], label_coefficients[rows], gradient,
                )  # fmt: skip
            else:
                scale = probability_coefficients[rows] * torch.exp(kept.maximum - lse[rows])
                torch.mul(kept.exponentials, scale.unsqueeze(1), out=gradient)
                if row_labels is not None:
                    write_at_labels(gradient, row_labels, columns.start, label_gradients[rows])
            if hidden_gradient is not None:
                multiply(gradient, weight[columns], hidden_gradient[rows], add=columns.start > 0)
            if weight_total is not None:
                multiply(gradient.T, hidden[rows], weight_total, add=rows.start > 0)
            if bias_total is not None:
                summed = gradient.sum(0, dtype=lse.dtype)
                bias_total.copy_(summed) if rows.start == 0 else bias_total.add_(summed)
        if weight_gradient is not None and weight_total is not None:
            weight_gradient[columns] = weight_total
        if bias_gradient is not None and bias_total is not None:
            bias_gradient[columns] = bias_total


def _total(gradient: Tensor | None, columns: slice, dtype: torch.dtype) -> Tensor | None:
    """Where one stretch of a gradient is summed: in place where its dtype is that of sums."""
    if gradient is None or gradient.dtype == dtype:
        return gradient if gradient is None else gradient[columns]
    return torch.empty_like(gradient[columns], dtype=dtype)
