"""The operators that `linear_divergence` calls in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import multiply, statistics_dtype
from fastpref.ops.divergence_rows import SCHEMA as COMPARISON_SCHEMA
from fastpref.ops.divergence_rows import Comparison, KeptRows, RowBlocks
from fastpref.ops.linear_logps_op import (
    empty_gradients,
    empty_hidden_gradient,
    incoming,
    rows_read,
)
from fastpref.ops.operands import SCHEMA, Logits, Operands, register, spread
from fastpref.ops.running import Running
from fastpref.ops.tiling import carve, grid_by_columns
from fastpref.ops.torch_tiles import label_columns

LEFT_FOR_BACKWARD = (
    "Tensor? divergence_gradient, Tensor? logps_gradient, Tensor? lse_gradient, "
    "Tensor running, Tensor rows, Tensor n_rows"
)


class Coefficients(NamedTuple):
    """What makes gradients of projections out of what `RowBlocks.read` gives: every tensor (n,)."""

    of_gradient: Tensor
    # Where log-probabilities or logsumexp have a gradient:
    of_probabilities: Tensor | None
    of_labels: Tensor | None  # what the labels' projections have of that gradient

    @classmethod
    def of(cls, student: Logits, given: tuple[Tensor | None, ...], running: Tensor) -> Coefficients:
        """From the gradients (N,) of divergences, log-probabilities and logsumexp."""
        dtype = statistics_dtype(student.hidden.dtype)
        like = student.hidden.new_empty(student.shape()[0], dtype=dtype)
        divergence, logps, lse = (incoming(one, student.rows, like) for one in given)
        factor = student.transform.factor
        if given[1] is None and given[2] is None:
            return cls(divergence * factor, None, None)
        state = Running.of(running[:, : len(like)])
        shares, slope = state.shares(), student.transform.slope(state.target_logit)
        of_labels = (lse * shares.label + logps * shares.others) * slope
        return cls(divergence * factor, (lse - logps) * factor, of_labels)

    def without(self, ignored: Tensor | None) -> Coefficients:
        """The same with nothing in the rows (n,) that are ignored."""
        if ignored is None:
            return self
        of_gradient, *more = (one if one is None else one.masked_fill(ignored, 0) for one in self)
        assert of_gradient is not None
        return Coefficients(of_gradient, *more)

    def gradient(
        self,
        rows: slice,
        columns: slice,
        read: KeptRows,  # of these rows
        labels: Tensor | None,  # (k,) of these rows
        out: Tensor,  # (k, w), written
    ) -> Tensor:
        """The gradient of one tile of projections, in the dtype of ``out``."""
        of_gradient = self.of_gradient[rows].unsqueeze(1)
        torch.mul(read.gradient[:, columns], of_gradient, out=out)
        if self.of_probabilities is None or self.of_labels is None or labels is None:
            return out
        assert read.probabilities is not None
        out.add_(read.probabilities[:, columns] * self.of_probabilities[rows].unsqueeze(1))
        column, inside = label_columns(labels, columns.start, columns.stop - columns.start)
        at_label = torch.where(inside, self.of_labels[rows], 0).unsqueeze(1)
        return out.scatter_add_(1, column, at_label)


class Totals(NamedTuple):
    """Sums of products, in the dtype of statistics; None where no gradient is wanted."""

    hidden: Tensor | None  # (n, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)

    def add(
        self,
        student: Logits,
        hidden: Tensor,  # (n, H) of all rows, in the dtype of products
        coefficients: Coefficients,
        group: slice,  # of rows, the first of which overwrite what is here
        read: KeptRows,  # of these rows
    ) -> None:
        """Add what some rows contribute: a matrix product each."""
        like, (vocab_size, width) = coefficients.of_gradient, student.weight.shape
        grid = grid_by_columns(group.stop - group.start, width, vocab_size, like)
        buffer = grid.tile_buffer(like)
        for columns, block in product(grid.column_blocks(), grid.row_blocks()):
            rows = slice(group.start + block.start, group.start + block.stop)
            tile = coefficients.gradient(
                rows, columns, read.of_rows(block), student.labels_of(rows),
                carve(buffer, block.stop - block.start, columns.stop - columns.start),
            )  # fmt: skip
            operand = tile.to(hidden.dtype)
            if self.hidden is not None:
                weight = student.weight[columns]
                multiply(operand, weight, self.hidden[rows], add=columns.start > 0)
            if self.weight is not None:
                multiply(operand.T, hidden[rows], self.weight[columns], add=rows.start > 0)
            if self.bias is not None:
                total, summed = self.bias[columns], tile.sum(0)
                total.add_(summed) if rows.start > 0 else total.copy_(summed)


def gradients_of_operands(
    *arguments: Any, blocks_of: Callable[..., RowBlocks] = RowBlocks
) -> tuple[Tensor, ...]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not wanted."""
    operands, more = Operands.split(arguments)
    comparison, (*given, running, rows, n_rows, cache, wants_hidden, wants_weight, wants_bias) = (
        Comparison.split(more)
    )
    rows = rows_read(operands, rows, n_rows)
    if operands.count(rows) == 0:
        return tuple(gradient.zero_() for gradient in empty_gradients(*arguments))

    operands, ignored = operands.without_ignored()
    student, comparison = operands.logits(rows), comparison.without(ignored)
    coefficients = Coefficients.of(student, tuple(given), running).without(ignored)
    count, like = student.shape()[0], coefficients.of_gradient
    kept = KeptRows.of(cache, student, probabilities=running.numel() > 0)
    hidden, (vocab_size, width) = student.hidden_of(slice(0, count)), operands.weight.shape
    totals = Totals(
        like.new_empty(count, width) if wants_hidden else None,
        like.new_empty(vocab_size, width) if wants_weight else None,
        like.new_empty(vocab_size) if wants_bias else None,
    )
    for group, read in _groups(student, comparison, kept, coefficients, blocks_of):
        totals.add(student, hidden, coefficients, group, read)
    if totals.hidden is not None:
        hidden = totals.hidden.to(operands.hidden.dtype)
        totals = totals._replace(hidden=spread(hidden, rows, len(operands.hidden)))
    return tuple(
        nothing if total is None else total.to(nothing.dtype)
        for total, nothing in zip(
            totals, empty_gradients(*arguments[:-3], *[False] * 3), strict=True
        )
    )


def _groups(
    student: Logits,
    comparison: Comparison,
    kept: KeptRows,
    coefficients: Coefficients,
    blocks_of: Callable[..., RowBlocks],
) -> Iterator[tuple[slice, KeptRows]]:
    """Some rows after others: those that were kept, and those that are read again."""
    number, count = len(kept.gradient), student.shape()[0]
    if number > 0:
        yield slice(0, number), kept
    if number == count:
        return
    probabilities = coefficients.of_probabilities is not None
    reader = blocks_of(student, comparison, stats=False, probabilities=probabilities)
    for rows in reader.of(number, count):
        yield rows, reader.read(rows)


backward_ops = register(
    "linear_divergence_backward",
    gradients_of_operands,
    empty_gradients,
    f"({SCHEMA}, {COMPARISON_SCHEMA}, {LEFT_FOR_BACKWARD}, Tensor cache, "
    "bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)",
)


def gradient_by_jacobian(*arguments: Any) -> Tensor:
    """Gradient of hidden (N, H) from the Jacobians (n, H).

    An operator without a derivative of its own: what autograd would make of a second derivative
    here is wrong, and it says so instead.
    """
    operands, more = Operands.split(arguments)
    *given, running, rows, n_rows, jacobian, logps_jacobian = more
    rows = rows_read(operands, rows, n_rows)
    count = operands.count(rows)
    like = jacobian[:count, 0]
    divergence, logps, lse = (incoming(one, rows, like) for one in given)
    total = jacobian[:count] * divergence.unsqueeze(1)
    if given[1] is not None or given[2] is not None:
        total.addcmul_(logps_jacobian[:count], (logps - lse).unsqueeze(1))
    if given[2] is not None:
        operands, _ = operands.without_ignored()
        of_labels = lse * operands.transform().slope(running[2, :count])
        operands.logits(rows).add_weight_of_labels_(total, of_labels)
    return spread(total.to(operands.hidden.dtype), rows, operands.hidden.shape[0])


by_jacobian_ops = register(
    "linear_divergence_gradient_by_jacobian",
    gradient_by_jacobian,
    empty_hidden_gradient,
    f"({SCHEMA}, {LEFT_FOR_BACKWARD}, Tensor jacobian, Tensor logps_jacobian) -> Tensor",
)
