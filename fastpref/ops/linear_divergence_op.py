"""The custom operator under `linear_divergence`: schema, fake and autograd.

As under `linear_logps`, the callers say with ``jacobian`` whether the student's hidden states alone
need a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.derivatives import first_derivative_only
from fastpref.ops.backend import operand_dtype, statistics_dtype
from fastpref.ops.divergence_backward import backward_ops, by_jacobian_ops
from fastpref.ops.divergence_rows import SCHEMA as COMPARISON_SCHEMA
from fastpref.ops.divergence_rows import (
    Comparison,
    KeptRows,
    RowBlocks,
    bytes_of_rows,
    product,
)
from fastpref.ops.operands import SCHEMA, Logits, Operands, register, spread
from fastpref.ops.running import Running

TEACHERS = 6  # the first fields of `Comparison` are tensors


class Found(NamedTuple):
    """What the operator returns; what is not wanted is empty or has no columns.

    All below the stats is for the backward pass, of the first n rows if n rows are read.
    """

    divergence: Tensor  # (N,)
    logps: Tensor  # (N,), with ``stats``
    lse: Tensor  # (N,), with ``stats``
    stats: Tensor  # (N, 3), with ``stats``: entropy, the largest logit, the label's
    running: Tensor  # (3, N), with ``stats``: the fields of `Running`
    jacobian: Tensor  # (N, H) of the divergences, with ``jacobian``
    logps_jacobian: Tensor  # (N, H) of the log-probabilities, with both
    rows: Tensor  # (N,) int64, which rows these are, if labels are chosen
    n_rows: Tensor  # (1,) int64 on the host: n, if labels are chosen
    cache: Tensor  # uint8, with ``scratch_bytes``


def divergence_and_more(*arguments: Any) -> tuple[Tensor, ...]:
    """Divergences and what else is wanted: `Found`."""
    operands, more = Operands.split(arguments)
    comparison, (wants_jacobian, wants_stats, _) = Comparison.split(more)
    found, count = Found(*empty_outputs(*arguments)), operands.hidden.shape[0]
    rows = operands.rows()
    n_rows = operands.count(rows)
    operands.note_rows(rows, found.rows, found.n_rows)
    if n_rows == 0:
        return tuple(one if one is found.n_rows else one.zero_() for one in found)

    outside = None if operands.compact else _outside(operands)
    operands, ignored = operands.without_ignored()
    student, comparison = operands.logits(rows), comparison.without(ignored)
    reader = read_rows(student, comparison, found, jacobian=wants_jacobian, stats=wants_stats)

    divergence = reader.numbers.divergence
    if outside is not None:
        divergence = divergence.masked_fill(outside, torch.nan)
    if ignored is not None:
        divergence = divergence.masked_fill(ignored, 0)
        for jacobian in (found.jacobian, found.logps_jacobian):
            jacobian.masked_fill_(ignored.unsqueeze(1), 0)
    found = found._replace(divergence=spread(divergence, rows, count))
    if not wants_stats:
        return tuple(found)
    running, stats = reader.reading()
    state = Running.of(running)
    logps, lse = state.logps(), state.lse()
    if ignored is not None:
        logps, lse = logps.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)
        running = running.masked_fill(ignored, 0)
        stats = stats.masked_fill(ignored.unsqueeze(1), 0)
    found.running[:, n_rows:] = 0
    found.running[:, :n_rows] = running
    logps, lse, stats = (spread(one, rows, count) for one in (logps, lse, stats))
    return tuple(found._replace(logps=logps, lse=lse, stats=stats))


def read_rows(
    student: Logits,
    comparison: Comparison,
    found: Found,  # what is for the backward pass is written
    *,
    jacobian: bool,
    stats: bool,
    blocks_of: Callable[..., RowBlocks] = RowBlocks,
) -> RowBlocks:
    """Read every row for the numbers that are wanted, and for the backward pass."""
    if jacobian:
        return _read_with_jacobians(student, comparison, found, stats, blocks_of)
    return _read(student, comparison, found.cache, stats, blocks_of)


def _read(
    student: Logits,
    comparison: Comparison,
    cache: Tensor,
    stats: bool,
    blocks_of: Callable[..., RowBlocks],
) -> RowBlocks:
    """Read every row, and keep the gradients of as many as the cache holds."""
    kept = KeptRows.of(cache, student, probabilities=stats)
    number = len(kept.gradient)
    reader = blocks_of(student, comparison, stats=stats, probabilities=stats and number > 0)
    for rows in reader.of(0, number):
        reader.read(rows, kept.of_rows(rows))
    for rows in reader.of(number, student.shape()[0]):
        reader.read_numbers(rows)
    reader.finish()
    return reader


def _read_with_jacobians(
    student: Logits,
    comparison: Comparison,
    found: Found,
    stats: bool,
    blocks_of: Callable[..., RowBlocks],
) -> RowBlocks:
    """Read every row, and write (n, H) ``d divergence / d hidden``.

    With ``stats`` that of the log-probabilities, too.
    """
    reader = blocks_of(student, comparison, stats=stats, probabilities=stats)
    count, factor = student.shape()[0], student.transform.factor
    jacobian, logps_jacobian = found.jacobian[:count], found.logps_jacobian[:count]
    for rows in reader.of(0, count):
        gradient, probabilities = reader.read(rows)
        product(gradient, student, jacobian[rows])
        if probabilities is not None:
            product(probabilities, student, logps_jacobian[rows])
    reader.finish()
    jacobian.mul_(factor)
    logps_jacobian.mul_(-factor)
    if stats:
        state = Running.of(reader.reading()[0])
        slope = student.transform.slope(state.target_logit) * state.shares().others
        student.add_weight_of_labels_(logps_jacobian, slope)
    for one in (found.jacobian, found.logps_jacobian):
        one[count:] = 0
    return reader


def _outside(operands: Operands) -> Tensor:
    """Which labels (N,) are neither ignored nor in the vocabulary."""
    labels = operands.labels
    assert labels is not None
    bad = (labels < 0) | (labels >= operands.weight.shape[0])
    return bad & (labels != operands.ignore_index)


def empty_outputs(*arguments: Any) -> tuple[Tensor, ...]:
    """Places for all that the operator returns."""
    operands, more = Operands.split(arguments)
    _, (wants_jacobian, wants_stats, scratch_bytes) = Comparison.split(more)
    hidden = operands.hidden
    (count, width), dtype = hidden.shape, statistics_dtype(hidden.dtype)
    chosen = operands.compacts()
    cache_bytes: int = 0
    if scratch_bytes:
        sizes = count, operands.weight.shape[0]
        everything = bytes_of_rows(*sizes, operand_dtype(hidden), wants_stats)
        # Not min, which would compile anew for a length on the other side.
        cache_bytes = torch.sym_min(scratch_bytes, everything)  # type: ignore[no-untyped-call]  # its own
    with_stats = count if wants_stats else 0
    return Found(
        hidden.new_empty(count, dtype=dtype),
        hidden.new_empty(with_stats, dtype=dtype),
        hidden.new_empty(with_stats, dtype=dtype),
        hidden.new_empty(with_stats, 3, dtype=dtype),
        hidden.new_empty(3, with_stats, dtype=dtype),
        # Wide, so that a gradient is rounded once, as under `linear_logps`.
        hidden.new_empty(count, width if wants_jacobian else 0, dtype=dtype),
        hidden.new_empty(count, width if wants_jacobian and wants_stats else 0, dtype=dtype),
        hidden.new_empty(count if chosen else 0, dtype=torch.int64),
        hidden.new_empty(int(chosen), dtype=torch.int64, device="cpu" if chosen else hidden.device),
        hidden.new_empty(cache_bytes, dtype=torch.uint8),
    )


linear_divergence_ops = register(
    "linear_divergence",
    divergence_and_more,
    empty_outputs,
    f"({SCHEMA}, {COMPARISON_SCHEMA}, bool jacobian, bool stats, int scratch_bytes)"
    f" -> ({', '.join(['Tensor'] * len(Found._fields))})",
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Leave for `backward` what it needs."""
    operands, more = Operands.split(inputs)
    comparison, (_, wants_stats, _) = Comparison.split(more)
    found = Found(*output)
    ctx.mark_non_differentiable(*found[3:])
    ctx.set_materialize_grads(False)
    ctx.options, ctx.stats = (operands[4:], comparison[TEACHERS:]), wants_stats
    ctx.save_for_backward(
        *operands[:4], *comparison[:TEACHERS], found.running, found.rows, found.n_rows,
        found.cache, found.jacobian, found.logps_jacobian,
    )  # fmt: skip


def backward(
    ctx: Any,
    from_divergence: Tensor | None,
    from_logps: Tensor | None,
    from_lse: Tensor | None,
    *_: None,
    by_reading: Callable[..., Any] | None = None,  # in place of the operator that reads again
) -> tuple[Tensor | None, ...]:
    """The gradients of the operands, from those of what is differentiable."""
    tensors, options = ctx.saved_tensors, ctx.options
    if not ctx.stats:  # what was not wanted may have gradients without an element
        from_logps = from_lse = None
    incoming = from_divergence, from_logps, from_lse
    if all(one is None for one in incoming):
        return (None,) * len(ctx.needs_input_grad)
    operands = Operands(*tensors[:4], *options[0])
    teachers, (running, rows, n_rows, cache, *jacobians) = tensors[4:-6], tensors[-6:]
    left = *incoming, running, rows, n_rows
    nothing = (None,) * (len(ctx.needs_input_grad) - 3)
    if jacobians[0].numel():
        op = by_jacobian_ops.of(operands)
        return op(*operands, *left, *jacobians), None, None, *nothing
    wanted = ctx.needs_input_grad[:3]
    read_again = by_reading or backward_ops.of(operands)
    found = read_again(*operands, *teachers, *options[1], *left, cache, *wanted)
    return *(one if want else None for one, want in zip(found, wanted, strict=True)), *nothing


for op in linear_divergence_ops:
    once = first_derivative_only("fastpref.linear_divergence")(backward)
    op.register_autograd(once, setup_context=setup_context)
