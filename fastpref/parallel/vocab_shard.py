"""One head over the vocabularies of several processes: each computes with its own rows alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from fastpref.checks import check_floating, refuse
from fastpref.derivatives import first_derivative_only
from fastpref.ops.linear_logps_op import Found, linear_logps_backward_ops, linear_logps_ops
from fastpref.ops.linear_stats_op import Partial, Sums, linear_stats_ops, merge
from fastpref.ops.operands import NO_LABEL, Operands, labelled_rows, spread, take
from fastpref.ops.running import Running, joined, joined_stats
from fastpref.ops.torch_tiles import LogitTransform

IGNORED = NO_LABEL - 1  # within a shard, for what the caller's `ignore_index` leaves out


class VocabShard(NamedTuple):
    """Which tokens this process has a head for."""

    group: ProcessGroup
    sizes: tuple[int, ...]  # tokens of every process, end to end in the order of their ranks

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def start(self) -> int:
        """The first token of this process."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """How many tokens this process has."""
        return self.sizes[self.rank]

    @property
    def total(self) -> int:
        """How many tokens all processes have."""
        return sum(self.sizes)

    def cut(self, total: int) -> VocabShard:
        """The same without the tokens from ``total`` on."""
        starts = (sum(self.sizes[:rank]) for rank in range(len(self.sizes)))
        pairs = zip(starts, self.sizes, strict=True)
        return self._replace(sizes=tuple(min(max(total - one, 0), size) for one, size in pairs))

    def is_like(self, other: VocabShard) -> bool:
        """Whether the same processes have the same tokens in the other, too."""
        ranks = (dist.get_process_group_ranks(one.group) for one in (self, other))
        return next(ranks) == next(ranks) and self.sizes == other.sizes

    def of_labels(self, labels: Tensor) -> Tensor:
        """Labels (n,) as this process has them: `NO_LABEL` for those of others."""
        own = (labels >= self.start) & (labels < self.start + self.size)
        return torch.where(own, labels - self.start, NO_LABEL)

    def words(self) -> str:
        """What it is, for an error."""
        ranks = dist.get_process_group_ranks(self.group)
        return f"shards of {self.sizes} tokens on processes {tuple(ranks)}"


def shard_of_group(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup, *, prefix: str = ""
) -> VocabShard:
    """Which part of the vocabulary this process has: the processes tell one another their sizes.

    The rows of all processes are end to end in the order of their ranks; their numbers may differ.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if isinstance(tensor, DTensor):
            expected = "a plain tensor beside a group (a DTensor knows its own)"
            refuse(f"{prefix}{name}", expected, "a DTensor")
    if not isinstance(group, ProcessGroup):
        refuse(f"{prefix}group", "a torch.distributed process group", type(group).__name__)
    check_floating(f"{prefix}weight", weight)
    own = torch.tensor([weight.shape[0]], device=weight.device)
    every = own.new_empty(dist.get_world_size(group), 1)
    dist.all_gather(list(every.unbind(0)), own, group=group)
    return VocabShard(group, tuple(every.flatten().tolist()))


def at_least_one_token(
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    transform: LogitTransform,
) -> tuple[Tensor, Tensor | None, LogitTransform]:
    """A head without a token as one with a masked token, which nothing else tells from it.

    What reads a vocabulary expects at least one token. The bias is -inf, and neither a soft cap nor
    a scale makes a finite number of it.
    """
    if weight.dim() != 2 or weight.shape[0] > 0:
        return weight, bias, transform
    masked = weight.new_full((1,), -torch.inf)
    return (
        torch.cat((weight, weight.new_zeros(1, weight.shape[1]))),
        masked if bias is None else torch.cat((bias, masked)),
        LogitTransform(transform.temperature),
    )


def sharded_logps(
    operands: Operands,  # hidden and labels in the whole vocabulary, alike on every process
    shard: VocabShard,
    stats: bool,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (N,), logsumexp (N,) and stats (N, 3), as of the whole vocabulary.

    What is not wanted is as `linear_logps_op.Found` has it.
    """
    within, rows = _within(operands, shard)
    logps, lse, numbers = _apply(*within, shard, stats, scratch_bytes)
    if operands.labels is None:
        return logps, lse, numbers
    if not operands.compact:
        ignored, outside = left_out(operands, shard)
        logps = logps.masked_fill(outside, torch.nan).masked_fill(ignored, 0)
        lse = lse.masked_fill(ignored, 0)
        numbers = numbers.masked_fill(outside.unsqueeze(1), torch.nan)
    count = operands.hidden.shape[0]
    return spread(logps, rows, count), spread(lse, rows, count), spread(numbers, rows, count)


def sharded_stats(operands: Operands, shard: VocabShard, sums: Sums) -> tuple[Tensor, Tensor]:
    """The numbers (N, 5) of a `Partial` and the labels' logits (N,), as of the whole vocabulary.

    Without ``labels`` there are no labels' logits: (0,).
    """
    within, rows = _within(operands, shard)
    numbers, target_logit = linear_stats_ops.of(within)(*within, *sums)
    if within.labels is not None:
        at_label = target_logit.masked_fill(within.labels < 0, -torch.inf)
        numbers = torch.cat((numbers, at_label.unsqueeze(1)), dim=1)
    every, count = gathered(numbers.T.contiguous(), shard.group), operands.hidden.shape[0]
    *parts, at_label = (*every.unbind(1), target_logit)[: len(Partial._fields) + 1]
    whole = torch.stack(merge(Partial(*parts)), dim=1)
    if operands.labels is None:
        return whole, target_logit
    target_logit = at_label.amax(0)
    if not operands.compact:
        target_logit = target_logit.masked_fill(left_out(operands, shard)[1], torch.nan)
    return spread(whole, rows, count), spread(target_logit, rows, count)


def _within(operands: Operands, shard: VocabShard) -> tuple[Operands, Tensor | None]:
    """The operands as this process's part of the vocabulary has them, and which rows they are.

    What no label needs is not sent between processes either, with ``compact``.
    """
    hidden, labels, rows = operands.hidden, operands.labels, None
    within = operands._replace(ignore_index=IGNORED, compact=False)
    if labels is None:
        return within, None
    if operands.compact:
        rows = labelled_rows(labels, shard.total, operands.ignore_index)
        hidden, labels = take(hidden, rows), take(labels, rows)
    ignored = labels == operands.ignore_index
    local = shard.of_labels(labels).masked_fill(ignored, IGNORED)
    return within._replace(hidden=hidden, labels=local), rows


def left_out(operands: Operands, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Which labels (N,) are ignored, and which of the others no process has."""
    assert operands.labels is not None
    ignored = operands.labels == operands.ignore_index
    return ignored, ~ignored & ((operands.labels < 0) | (operands.labels >= shard.total))


def _apply(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _ShardedLogps.apply(*arguments)  # type: ignore[no-untyped-call]  # autograd's own
    return found


class _ShardedLogps(Function):
    """The operator under `linear_logps` on each shard, its numbers joined over the processes.

    Its backward takes whatever running numbers it is given: with those of the whole vocabulary,
    every probability in it is that of the whole vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        operands, (shard, stats, scratch_bytes) = Operands.split(arguments)
        found = Found(*linear_logps_ops.of(operands)(*operands, False, stats, scratch_bytes))
        parts, every = _of_every_shard(found, operands.labels, shard.group)
        running = joined(parts)
        numbers = joined_stats(parts, every) if stats else found.stats
        whole = Running.of(running)
        logps = found.logps if operands.labels is None else whole.logps()
        ctx.group, ctx.options = shard.group, operands[4:]
        ctx.mark_non_differentiable(numbers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands[:4], running, found.rows, found.n_rows, found.cache)
        return logps, whole.lse(), numbers

    @staticmethod
    @first_derivative_only("fastpref.linear_logps")
    def backward(
        ctx: Any, logps_gradient: Tensor | None, lse_gradient: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        *tensors, running, rows, n_rows, cache = ctx.saved_tensors
        operands, wanted = Operands(*tensors, *ctx.options), ctx.needs_input_grad[:3]
        found = linear_logps_backward_ops.of(operands)(
            *operands, logps_gradient, lse_gradient, running, rows, n_rows, cache, *wanted
        )
        if wanted[0]:
            dist.all_reduce(found[0], group=ctx.group)
        gradients = (one if want else None for one, want in zip(found, wanted, strict=True))
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)


def _of_every_shard(
    found: Found, labels: Tensor | None, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Running numbers (shards, 3, N) and stats (shards, N, 3), or (shards, N, 0) where not wanted.

    The label's logit is -inf where the label is not.
    """
    own = torch.cat((found.running, found.stats.T))
    if labels is not None:
        own[2].masked_fill_(labels < 0, -torch.inf)
    every = gathered(own, group)
    return every[:, :3], every[:, 3:].transpose(1, 2)


def gathered(own: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all processes, of one shape and contiguous, in the order of their ranks."""
    every = own.new_empty(dist.get_world_size(group), *own.shape)
    if own.numel():
        dist.all_gather(list(every.unbind(0)), own, group=group)
    return every
