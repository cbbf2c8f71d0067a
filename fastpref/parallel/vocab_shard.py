"""One head over the vocabularies of several processes: each computes with its own rows alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from fastpref.checks import check_floating, refuse
from fastpref.ops.linear_logps_op import linear_logps_backward_op, linear_logps_op
from fastpref.ops.operands import Operands, labelled_rows, spread, take

IGNORED = -1  # the label, within a shard, of what the caller's `ignore_index` leaves out


class VocabShard(NamedTuple):
    """Which tokens this process has a head for: ``weight.shape[0]`` of them from ``start`` on."""

    group: ProcessGroup
    start: int
    total: int  # tokens of all processes


def shard_of_group(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup
) -> VocabShard:
    """Which part of the vocabulary this process has: the processes tell one another their sizes.

    The rows of all processes are end to end in the order of their ranks; their numbers may differ.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if isinstance(tensor, DTensor):
            refuse(name, "a plain tensor beside a group (a DTensor knows its own)", "a DTensor")
    if not isinstance(group, ProcessGroup):
        refuse("group", "a torch.distributed process group", type(group).__name__)
    check_floating("weight", weight)
    own = torch.tensor([weight.shape[0]], device=weight.device)
    every = own.new_empty(dist.get_world_size(group), 1)
    dist.all_gather(list(every.unbind(0)), own, group=group)
    sizes = every.flatten().tolist()
    return VocabShard(group, sum(sizes[: dist.get_rank(group)]), sum(sizes))


def sharded_logps(
    operands: Operands,  # hidden and labels in the whole vocabulary, alike on every process
    shard: VocabShard,
    stats: bool,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (N,), logsumexp (N,) and stats (N, 3), as of the whole vocabulary.

    What is not wanted is as `linear_logps_op` has it.
    """
    hidden, labels, ignore_index = operands.hidden, operands.labels, operands.ignore_index
    within = operands._replace(ignore_index=IGNORED, compact=False)
    if labels is None:
        nothing = hidden.new_empty(0, dtype=torch.bool)
        return _apply(*within, nothing, shard, stats, scratch_bytes)
    count, rows = hidden.shape[0], None
    if operands.compact:  # what no label needs is not sent either
        rows = labelled_rows(labels, shard.total, ignore_index)
        hidden, labels = take(hidden, rows), take(labels, rows)
    ignored = labels == ignore_index
    own = ~ignored & (labels >= shard.start) & (labels < shard.start + operands.weight.shape[0])
    # Any label will do where another process has the right one.
    local = torch.where(own, labels - shard.start, 0).masked_fill(ignored, IGNORED)
    within = within._replace(hidden=hidden, labels=local)
    logps, lse, numbers = _apply(*within, own, shard, stats, scratch_bytes)
    if not operands.compact:
        outside = ~ignored & ((labels < 0) | (labels >= shard.total))
        logps = logps.masked_fill(outside, torch.nan).masked_fill(ignored, 0)
        lse = lse.masked_fill(ignored, 0)
        numbers = numbers.masked_fill(outside.unsqueeze(1), torch.nan)
    return spread(logps, rows, count), spread(lse, rows, count), spread(numbers, rows, count)


def _apply(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _ShardedLogps.apply(*arguments)  # type: ignore[no-untyped-call]  # autograd's own
    return found


class _ShardedLogps(Function):
    """The operator under `linear_logps` on each shard, its numbers joined over the processes.

    Its backward takes whatever logsumexp it is given: with that of the whole vocabulary, every
    probability in it is that of the whole vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        operands, (own, shard, stats, scratch_bytes) = Operands.split(arguments)
        logps, lse, _, numbers, cache = linear_logps_op(*operands, False, stats, scratch_bytes)
        candidates, whole_lse, own_share = _of_all_shards(logps, lse, shard.group)
        if stats:
            numbers = _stats_of_all_shards(numbers, own, own_share, shard.group)
        ctx.group, ctx.options = shard.group, operands[4:]
        ctx.mark_non_differentiable(numbers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands[:4], own, candidates, whole_lse, cache)
        return _sum(candidates.masked_fill(~own, 0), shard.group), whole_lse, numbers

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logps_gradient: Tensor | None, lse_gradient: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, own, logps, lse, cache = ctx.saved_tensors
        if labels is not None and logps_gradient is not None:
            # Of a label elsewhere only its logsumexp is here, which it takes from its logit.
            elsewhere = logps_gradient.masked_fill(own, 0)
            logps_gradient = logps_gradient.masked_fill(~own, 0)
            lse_gradient = -elsewhere if lse_gradient is None else lse_gradient - elsewhere
        wanted = ctx.needs_input_grad[:3]
        found = linear_logps_backward_op(
            hidden, weight, bias, labels, *ctx.options,
            logps_gradient, lse_gradient, logps, lse, cache, *wanted,
        )  # fmt: skip
        if wanted[0]:
            dist.all_reduce(found[0], group=ctx.group)
        gradients = (one if want else None for one, want in zip(found, wanted, strict=True))
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)


def _of_all_shards(
    logps: Tensor, lse: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and logsumexp (N,) within a shard, as they are in the whole vocabulary.

    And the shard's log-probability (N,). What the other shards add to a label's own is added to its
    log-probability, too: no difference of large numbers where the model is certain.
    """
    if not lse.numel():
        return logps, lse, lse
    every = lse.new_empty(dist.get_world_size(group), *lse.shape)
    dist.all_gather(list(every.unbind(0)), lse, group=group)
    total = every.logsumexp(0)
    every[dist.get_rank(group)] = -torch.inf
    # log(1 + exp(x)), whose own function stops counting at x = 20: too early for float64.
    difference = every.logsumexp(0) - lse
    share = -torch.logaddexp(difference, torch.zeros_like(difference))
    # A shard that is masked as a whole, as padding of the vocabulary is.
    share = share.masked_fill(lse == -torch.inf, -torch.inf)
    logps = (logps + share).masked_fill(lse == -torch.inf, -torch.inf) if logps.numel() else logps
    return logps, total, share


def _stats_of_all_shards(
    numbers: Tensor,  # (N, 3) within this shard
    own: Tensor,  # (N,) bool: the label is in this shard
    share: Tensor,  # (N,) log-probability of this shard
    group: ProcessGroup,
) -> Tensor:
    """Entropy, largest logit and label's logit (N, 3) in the whole vocabulary.

    A distribution that is a mixture of others without overlap has the mean of their entropies, and
    the entropy of which of them it is.
    """
    entropy, maximum, target_logit = numbers.unbind(1)
    part = (share.exp() * (entropy - share)).masked_fill(share == -torch.inf, 0)
    summed = _sum(torch.stack((part, target_logit.masked_fill(~own, 0))), group)
    maximum = maximum.clone()
    if maximum.numel():
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    return torch.stack((summed[0], maximum, summed[1]), dim=1)


def _sum(values: Tensor, group: ProcessGroup) -> Tensor:
    if values.numel():
        dist.all_reduce(values, group=group)
    return values
