"""One reading of the vocabulary: its running numbers, and the Jacobian of the log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.ops.backend import (
    multiply,
    operand_dtype,
    statistics_dtype,
    tile_functions,
    uses_triton,
)
from fastpref.ops.linear_stats_op import Partial, Sums, merge, partial_of_rows
from fastpref.ops.operands import Logits, Operands
from fastpref.ops.running import Running, joined, joined_stats
from fastpref.ops.tiling import KeptTiles, carve, grid_by_rows

# Each reading gives running numbers (3, n), the fields of `Running`, and where wanted stats (n, 3):
# entropy, the largest logit, the label's; else (n, 0).
Reading = tuple[Tensor, Tensor]


def read(operands: Operands, rows: Tensor | None, cache: Tensor, *, stats: bool) -> Reading:
    """Read with nothing for the backward pass but the tiles that ``cache`` holds.

    What none of them covers is read by the kernel that holds no tile, where there is one. Products
    of float32 are cuBLAS's, which has twice its rate and knows whether TF32 is allowed.
    """
    if not uses_triton(operands.hidden) or operands.hidden.itemsize > 2:
        return read_by_tiles(operands.logits(rows), cache=cache, stats=stats)
    logits, numbers = operands.logits(rows), operands.hidden.new_empty(0, dtype=torch.float32)
    grid = logits.grid_by_columns(numbers)
    tiles = KeptTiles(cache, grid, operand_dtype(operands.hidden), numbers.dtype)
    kept, vocab_size = tiles.columns(), grid.vocab_size
    if kept == 0:
        return read_by_kernel(operands, rows, stats=stats)
    if kept == vocab_size:
        return read_by_tiles(logits, cache=cache, stats=stats)
    parts = [operands.of_columns(one) for one in (slice(0, kept), slice(kept, vocab_size))]
    readings = (
        read_by_tiles(parts[0].logits(rows), cache=cache, stats=stats),
        read_by_kernel(parts[1], rows, stats=stats),
    )
    return _joined(readings, [part.chosen_labels(rows) for part in parts])


def _joined(readings: Sequence[Reading], labels: Sequence[Tensor | None]) -> Reading:
    """One reading of several parts of the vocabulary; NaN where none has the label."""
    running = torch.stack([one for one, _ in readings])
    stats = torch.stack([one for _, one in readings])
    nowhere: Tensor | bool = labels[0] is not None
    for part, local in zip(running, labels, strict=True):
        if local is not None:
            part[2].masked_fill_(local < 0, -torch.inf)
            nowhere = nowhere & (local < 0)
    whole = joined(running)
    numbers = joined_stats(running, stats) if stats.shape[2] else stats[0]
    if isinstance(nowhere, Tensor):
        whole[2].masked_fill_(nowhere, torch.nan)
        if stats.shape[2]:
            numbers[:, 2].masked_fill_(nowhere, torch.nan)
    return whole, numbers


def read_by_kernel(operands: Operands, rows: Tensor | None, *, stats: bool) -> Reading:
    """Read the head in one kernel that holds no tile."""
    if stats:
        sums = Sums(second=False, shortfall=True, squares=False)
        partial, at_label = partial_of_rows(operands, rows, sums)
        return reading_of_partial(partial, at_label, operands.chosen_labels(rows))
    from fastpref.kernels.logsumexp import projection_logsumexp

    reference, sum_exp, target_logit = projection_logsumexp(*operands.for_kernel(rows))
    if operands.labels is None:
        target_logit = torch.full_like(reference, -torch.inf)
    return torch.stack((reference, sum_exp, target_logit)), reference.new_empty(len(reference), 0)


def read_by_tiles(
    logits: Logits,
    *,
    cache: Tensor,  # uint8, flat, written: as many tiles of exponentials as it holds
    stats: bool = False,
) -> Reading:
    """Fold the vocabulary into the running numbers of every row: one matrix product."""
    fold_tile = tile_functions(logits.hidden).fold_tile
    running = _start(logits, stats=stats)
    grid = logits.grid_by_columns(running)
    scratch = grid.tile_buffer(running)
    tiles = KeptTiles(cache, grid, operand_dtype(logits.hidden), scratch.dtype)
    for rows in grid.row_blocks():
        state = running[:, rows].unbind()
        hidden = logits.hidden_of(rows)
        for columns in grid.column_blocks():
            kept = tiles.tile(columns)
            exponentials = None if kept is None else kept.exponentials[rows]
            tile = carve(scratch, len(hidden), columns.stop - columns.start)
            # A product in the dtype of what is kept goes straight there, to be folded in place.
            if exponentials is not None and exponentials.dtype == scratch.dtype and not stats:
                tile = exponentials
            fold_tile(
                logits.project(hidden, columns, tile), logits.labels_of(rows), columns.start,
                logits.transform, *state, exponentials=exponentials,
            )  # fmt: skip
            if kept is not None:
                kept.reference[rows] = state[0]
    return _finish(running, logits, stats=stats)


def read_with_jacobian(logits: Logits, jacobian: Tensor, *, stats: bool = False) -> Reading:
    """Read, and write (n, H) ``d logps / d hidden`` (without labels ``d lse / d hidden``).

    Two matrix products: as in flash attention, tiles of exponentials meet their stretch of the
    weight at once, relative to a reference that later tiles may raise.
    """
    running = _start(logits, stats=stats)
    _sum_weights(running, logits, jacobian, stats=stats)
    state = Running.of(running)
    if logits.labels is None:
        # The sum is 0 only where every logit is -inf, and then so is the total.
        smallest = torch.finfo(jacobian.dtype).tiny
        factor = logits.transform.factor / state.sum_exp.clamp_min(smallest)
        jacobian.mul_(factor.unsqueeze(1))
    else:
        shares = state.shares()
        jacobian.mul_((-logits.transform.factor * shares.unit).unsqueeze(1))
        slope = logits.transform.slope(state.target_logit) * shares.others
        jacobian.addcmul_(logits.weight_of_labels(), slope.unsqueeze(1))
    return _finish(running, logits, stats=stats)


def _sum_weights(running: Tensor, logits: Logits, sums: Tensor, *, stats: bool) -> None:
    """Fold the vocabulary, and write its rows' sums (n, H), weighted by their exponentials."""
    fold_tile = tile_functions(logits.hidden).fold_tile
    count, vocab_size = logits.shape()
    grid = grid_by_rows(count, logits.hidden.shape[1], vocab_size, running)
    scratch = grid.tile_buffer(running)
    operands = operand_dtype(logits.hidden)
    buffer = scratch
    if stats or not grid.is_in_place() or operands != scratch.dtype:
        buffer = grid.operand_buffer(scratch.new_empty(0, dtype=operands))
    for rows in grid.row_blocks():
        state = running[:, rows].unbind()
        hidden, total = logits.hidden_of(rows), sums[rows]
        for stretch in grid.column_stretches():
            operand = carve(buffer, len(hidden), stretch.stop - stretch.start)
            summed = [total] if stretch.start > 0 else []
            for columns in grid.column_blocks(stretch):
                start = columns.start - stretch.start
                tile = carve(scratch, len(hidden), columns.stop - columns.start)
                fold_tile(
                    logits.project(hidden, columns, tile), logits.labels_of(rows), columns.start,
                    logits.transform, *state,
                    exponentials=operand[:, start : columns.stop - stretch.start],
                    earlier=[operand[:, :start], *summed] if start > 0 else summed,
                )  # fmt: skip
            multiply(operand, logits.weight[stretch], total, add=stretch.start > 0)


def _start(logits: Logits, *, stats: bool) -> Tensor:
    """The running numbers (3 or, with ``stats``, 5, n) of `fold_tile`, before the first tile."""
    dtype = statistics_dtype(logits.hidden.dtype)
    running = logits.hidden.new_zeros(5 if stats else 3, logits.shape()[0], dtype=dtype)
    # A finite start: -inf minus -inf would be NaN where a whole tile is masked.
    running[0] = torch.finfo(dtype).min
    running[2] = -math.inf if logits.labels is None else math.nan
    return running


def _finish(running: Tensor, logits: Logits, *, stats: bool) -> Reading:
    """What follows from the running numbers once every column has been seen."""
    if not stats:
        return running, running.new_empty(running.shape[1], 0)
    reference, sum_exp, target_logit, rest, shortfall = running.unbind()
    nothing, none = torch.zeros_like(reference), torch.full_like(reference, -torch.inf)
    others = Partial(torch.where(sum_exp > 0, reference, none), none, rest, shortfall, nothing)
    at_label = target_logit
    if logits.labels is not None:
        at_label = target_logit.masked_fill(logits.labels < 0, -torch.inf)
    label = Partial(at_label, none, nothing, nothing, nothing)
    whole = merge(Partial(*(torch.stack(one) for one in zip(others, label, strict=True))))
    return running[:3], torch.stack((whole.entropy(), whole.maximum, target_logit), dim=1)


def reading_of_partial(whole: Partial, target_logit: Tensor, labels: Tensor | None) -> Reading:
    """From the numbers of all logits: the label's, one of them, is taken out of the sum again."""
    none = -torch.inf
    reference = whole.maximum.clamp_min(torch.finfo(whole.maximum.dtype).min)
    if labels is None:
        target_logit = torch.full_like(reference, none)
    top = (whole.maximum > none).to(reference.dtype)
    at_label = target_logit if labels is None else target_logit.masked_fill(labels < 0, none)
    # Where the label is not the largest, at most half of the sum goes.
    others = top + whole.others - torch.exp(at_label - reference)
    others = torch.where(at_label >= reference, whole.others, others)
    stats = torch.stack((whole.entropy(), whole.maximum, target_logit), dim=1)
    return torch.stack((reference, others, target_logit)), stats
