"""Divergences of heads over the vocabularies of several processes.

Each process projects its own tokens. What is summed over the vocabulary, it sums over these, and
all learn the whole: block by block what gradients need, of all rows at once what only values need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from fastpref.derivatives import first_derivative_only
from fastpref.ops.backend import operand_dtype
from fastpref.ops.divergence_backward import gradients_of_operands
from fastpref.ops.divergence_rows import (
    Comparison,
    RowBlocks,
    bytes_of_rows,
    reading_of_numbers,
)
from fastpref.ops.divergences import Join
from fastpref.ops.forward import Reading
from fastpref.ops.linear_divergence_op import (
    Found,
    backward,
    empty_outputs,
    read_rows,
    setup_context,
)
from fastpref.ops.operands import Logits, Operands, labelled_rows, spread, take
from fastpref.ops.running import Running
from fastpref.ops.tiling import rows_per_block
from fastpref.ops.torch_tiles import largest
from fastpref.parallel.vocab_shard import VocabShard, gathered, left_out


def sharded_divergence(
    operands: Operands,  # hidden and labels in the whole vocabulary, alike on every process
    comparison: Comparison,  # of the same shard
    shard: VocabShard,
    *,
    jacobian: bool,
    stats: bool,
    scratch_bytes: int,
) -> tuple[Tensor, ...]:
    """The first fields of `linear_divergence_op.Found`, up to the stats, as of one process."""
    hidden, labels, count = operands.hidden, operands.labels, operands.hidden.shape[0]
    assert labels is not None
    rows = ignored = outside = None
    if operands.compact:
        rows = labelled_rows(labels, shard.total, operands.ignore_index)
        hidden, labels = take(hidden, rows), take(labels, rows)
        comparison = comparison.of_rows(rows)
    else:
        # What these rows give is overwritten, and their gradients are 0 times what is finite.
        ignored, outside = left_out(operands, shard)
        hidden = hidden.masked_fill(ignored.unsqueeze(1), 0)
        comparison = comparison.without(ignored)
    within = operands._replace(hidden=hidden, labels=shard.of_labels(labels), compact=True)
    scratch_bytes = _alike(scratch_bytes, within, shard, stats=stats)
    found = _apply(*within, *comparison, shard, jacobian, stats, scratch_bytes)

    def whole(values: Tensor) -> Tensor:
        if ignored is None or outside is None:
            return spread(values, rows, count)
        shape = -1, *(1,) * (values.dim() - 1)
        of_others = values.masked_fill(outside.view(shape), torch.nan)
        return of_others.masked_fill(ignored.view(shape), 0)

    wanted = len(found) if stats else 1
    return *(whole(one) for one in found[:wanted]), *found[wanted:]


def _alike(scratch_bytes: int, operands: Operands, shard: VocabShard, *, stats: bool) -> int:
    """What holds as many rows as any other process holds in at most so many bytes."""
    dtype = operand_dtype(operands.hidden)
    number = scratch_bytes // bytes_of_rows(1, max(shard.sizes), dtype, stats)
    number = min(number, operands.hidden.shape[0])
    return bytes_of_rows(number, operands.weight.shape[0], dtype, stats)


def _apply(*arguments: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _ShardedDivergence.apply(*arguments)  # type: ignore[no-untyped-call]  # autograd's own
    return found


class _ShardedDivergence(Function):
    """The operator under `linear_divergence`, for processes that have a part of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        operands, more = Operands.split(arguments)
        comparison, (shard, jacobian, stats, scratch_bytes) = Comparison.split(more)
        inputs = *operands, *comparison, jacobian, stats, scratch_bytes
        found = Found(*empty_outputs(*inputs))
        operands.note_rows(None, found.rows, found.n_rows)
        reader = read_rows(
            operands.logits(None), comparison, found,
            jacobian=jacobian, stats=stats, blocks_of=partial(ShardedRows, shard),
        )  # fmt: skip
        found = found._replace(divergence=reader.numbers.divergence)
        if stats:
            running, numbers = reader.reading()
            state = Running.of(running)
            found = found._replace(
                logps=state.logps(), lse=state.lse(), stats=numbers, running=running
            )
        ctx.shard = shard
        setup_context(ctx, inputs, found)
        return found[:4]

    @staticmethod
    @first_derivative_only("fastpref.linear_divergence")
    def backward(ctx: Any, *incoming: Any) -> tuple[Tensor | None, ...]:
        of_blocks = partial(gradients_of_operands, blocks_of=partial(ShardedRows, ctx.shard))
        found = backward(ctx, *incoming, by_reading=of_blocks)
        if found[0] is not None:
            dist.all_reduce(found[0], group=ctx.shard.group)
        return found


class ShardedRows(RowBlocks):
    """Rows of which this process has some columns.

    All processes read the same blocks, at the same time: what they tell one another is of these.
    """

    has_kernels = False  # one reads a row from its normalisers to its gradient
    of_no_label = -math.inf

    def __init__(
        self,
        shard: VocabShard,
        student: Logits,
        comparison: Comparison,
        *,
        stats: bool,
        probabilities: bool,
    ) -> None:
        self.shard = shard
        super().__init__(student, comparison, stats=stats, probabilities=probabilities)

    def _steps(self, count: int, like: Tensor, spares: int) -> tuple[int, int]:
        """A block is one piece, so that there is one exchange for all of it."""
        step = rows_per_block(count, max(self.shard.sizes), like, tiles=2 + spares)
        return step, step

    def _normalise(self, *heads: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As `normalise_`: the top is that of this process, all else of the whole vocabulary."""
        tops = [largest(logits) for logits, _ in heads]
        maxima, owners = self._gathered(maximum for maximum, _ in tops).max(0)
        parts = []
        for (logits, out), (_, top), maximum, owner in zip(
            heads, tops, maxima, owners, strict=True
        ):
            torch.exp(logits.sub_(maximum.unsqueeze(1)), out=out)
            column, is_top = top.unsqueeze(1), (owner == self.shard.rank).unsqueeze(1)
            at_column = out.gather(1, column)
            parts.append(out.scatter_(1, column, at_column.masked_fill(is_top, 0)).sum(1))
            out.scatter_(1, column, at_column)
        every = self._gathered(parts)
        others = every.sum(0).add_(maxima * 0)
        units = 1 / (1 + others)
        # Of every process in the first head's distribution.
        self.shares = every[:, 0].scatter_add(0, owners[:1], torch.ones_like(units[:1])) * units[0]
        for (_, out), unit in zip(heads, units, strict=True):
            out.mul_(unit.unsqueeze(1))
        return [
            (maximum, top.unsqueeze(1), total)
            for maximum, (_, top), total in zip(maxima, tops, others, strict=True)
        ]

    def _join(self) -> Join:
        return self._joined

    def _joined(self, mean: Tensor, of_top: Tensor) -> tuple[Tensor, Tensor]:
        """Every process has its own reference: that of the largest share is the one of all."""
        means, tops = self._gathered((mean.squeeze(1), of_top.squeeze(1))).unbind(1)
        largest_share = self.shares.argmax(0, keepdim=True)
        reference = tops.gather(0, largest_share)
        parts = means + (tops - reference) * self.shares
        here = largest_share == self.shard.rank
        of_here = parts[self.shard.rank] + torch.where(here, reference, 0)
        below_top = (reference - of_top.view_as(reference)) + parts.sum(0)
        return of_here.view_as(mean), below_top.view_as(mean)

    def _gathered(self, numbers: Iterable[Tensor]) -> Tensor:
        """Numbers (k, n), each of them (n,), of all processes: (processes, k, n)."""
        return gathered(torch.stack(list(numbers)), self.shard.group)

    def finish(self) -> None:
        """Sum up what each process has of all rows."""
        numbers = self.numbers
        if not self.stats:
            (divergence,) = self._gathered([numbers.divergence]).unbind(1)
        else:
            own = numbers.divergence, numbers.shortfall, numbers.target_logit
            divergence, shortfall, target_logit = self._gathered(own).unbind(1)
            numbers.shortfall.copy_(shortfall.sum(0))
            numbers.target_logit.copy_(target_logit.amax(0))
        numbers.divergence.copy_(divergence.sum(0))
        super().finish()

    def reading(self) -> Reading:
        """As of one process, which has every label that counts."""
        assert self.student.labels is not None
        return reading_of_numbers(self.numbers, self.student.labels.clamp_min(0))
