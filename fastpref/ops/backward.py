"""Gradients of the hidden states and of the head, once the incoming gradient is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import multiply, tile_functions
from fastpref.ops.operands import Logits
from fastpref.ops.tiling import KeptTiles, carve
from fastpref.ops.torch_tiles import write_at_labels


class LogitGradients(NamedTuple):
    """What makes gradients of logits: every tensor (n,), in the dtype of statistics."""

    reference: Tensor
    coefficients: Tensor  # of exp(logit - reference), with the constant part of the slope
    of_labels: Tensor  # of the labels' projections


def gradients(
    logits: Logits,
    given: LogitGradients,
    *,
    cache: Tensor,  # uint8, flat, as `read_by_tiles` left it
    hidden_gradient: Tensor | None,  # (n, H) in the dtype of statistics, written
    weight_gradient: Tensor | None,  # (V, H), written
    bias_gradient: Tensor | None,  # (V,), written
) -> None:
    """Write the gradients that are wanted: a matrix product each, one more for what is not kept.

    The vocabulary is the outer loop, so each stretch of the weight's gradient is finished at once.
    The labels' own rows of the weight are added last: among the many small terms of a product, each
    partial sum would be as large as one of theirs, and rounded like it.
    """
    sums = given.reference
    grid = logits.grid_by_columns(sums)
    hidden, weight = logits.hidden_of(slice(0, grid.rows)), logits.weight
    scratch = grid.tile_buffer(sums)
    buffer = scratch
    if not grid.is_in_place() or hidden.dtype != sums.dtype:
        buffer = grid.operand_buffer(hidden)
    tiles = KeptTiles(cache, grid, hidden.dtype, sums.dtype)
    # A product rounds once: if it is the whole sum, it may have the narrow dtype of the weight.
    at_once = (sums.dtype, hidden.dtype) if grid.stretch_rows >= grid.rows else (sums.dtype,)
    others = given
    if hidden_gradient is not None:
        others = given._replace(of_labels=torch.zeros_like(given.of_labels))
    for columns in grid.column_stretches():
        weight_total = _total(weight_gradient, columns, at_once)
        bias_total = _total(bias_gradient, columns, (sums.dtype,))
        for rows in grid.row_stretches():
            gradient = carve(buffer, rows.stop - rows.start, columns.stop - columns.start)
            _fill(gradient, logits, hidden, others, tiles, rows, columns, scratch)
            if hidden_gradient is not None:
                total = hidden_gradient[rows]
                multiply(gradient, weight[columns], total, add=columns.start > 0)
                if logits.labels is not None:
                    labels = logits.labels[rows]
                    write_at_labels(gradient, labels, columns.start, given.of_labels[rows])
            if weight_total is not None:
                multiply(gradient.T, hidden[rows], weight_total, add=rows.start > 0)
            if bias_total is not None:
                summed = gradient.sum(0, dtype=sums.dtype)
                bias_total.copy_(summed) if rows.start == 0 else bias_total.add_(summed)
        _write(weight_gradient, columns, weight_total)
        _write(bias_gradient, columns, bias_total)
    if hidden_gradient is not None and logits.labels is not None:
        logits.add_weight_of_labels_(hidden_gradient, given.of_labels)


def _fill(
    gradient: Tensor,  # (k, w) in the dtype of products, written
    logits: Logits,
    hidden: Tensor,  # (n, H) of all rows
    given: LogitGradients,
    tiles: KeptTiles,
    stretch: slice,  # of rows
    stretch_columns: slice,
    scratch: Tensor,
) -> None:
    """Gradients of some rows' projections on some columns, from kept tiles or computed again."""
    functions = tile_functions(logits.hidden)
    for columns in tiles.grid.column_blocks(stretch_columns):
        kept = tiles.tile(columns)
        across = slice(columns.start - stretch_columns.start, columns.stop - stretch_columns.start)
        for rows in tiles.grid.row_blocks(stretch):
            out = gradient[rows.start - stretch.start : rows.stop - stretch.start, across]
            labels = logits.labels_of(rows)
            reference, coefficients, of_labels = (one[rows] for one in given)
            if kept is None:
                tile = carve(scratch, len(out), columns.stop - columns.start)
                functions.gradient_tile(
                    logits.project(hidden[rows], columns, tile), labels, columns.start,
                    logits.transform, reference, coefficients, of_labels, out,
                )  # fmt: skip
            else:
                functions.gradient_of_kept_tile(
                    kept.exponentials[rows], labels, columns.start, kept.reference[rows],
                    reference, coefficients, of_labels, out,
                )  # fmt: skip


def _total(
    gradient: Tensor | None, columns: slice, dtypes: tuple[torch.dtype, ...]
) -> Tensor | None:
    """Where one stretch of a gradient is summed: in its place if it has one of ``dtypes``."""
    if gradient is None or gradient.dtype in dtypes:
        return gradient if gradient is None else gradient[columns]
    return torch.empty_like(gradient[columns], dtype=dtypes[0])


def _write(gradient: Tensor | None, columns: slice, total: Tensor | None) -> None:
    """Put the sum of one stretch in its place, if it is not there already."""
    if gradient is not None and total is not None and gradient.dtype != total.dtype:
        gradient[columns] = total
