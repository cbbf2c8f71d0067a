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
from fastpref.ops.rows import labelled_rows
from fastpref.ops.transform import LogitTransform

IGNORED = -1  # the label, within a shard, of what the caller's `ignore_index` leaves out


class VocabShard(NamedTuple):
    """Which tokens this process has a head for: ``weight.shape[0]`` of them from ``start`` on."""

    group: ProcessGroup
    start: int
    total: int  # tokens of all processes


def shard_of_group(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup
) -> VocabShard:
    """This process's place in a vocabulary whose sizes it asks the others of ``group`` for.

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
    hidden: Tensor,  # (N, H), the same on every process
    weight: Tensor,  # (v, H), this process's rows of the head
    bias: Tensor | None,  # (v,)
    labels: Tensor | None,  # (N,) int64 in the whole vocabulary, the same on every process
    shard: VocabShard,
    transform: LogitTransform,
    ignore_index: int,
    compact: bool,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,), empty without labels, and logsumexp (N,) of the whole vocabulary."""
    if labels is None:
        nothing = hidden.new_empty(0, dtype=torch.bool)
        return _apply(hidden, weight, bias, None, nothing, shard, transform, scratch_bytes)
    count = hidden.shape[0]
    rows = labelled_rows(labels, shard.total, ignore_index) if compact else None
    if rows is not None:  # what no label needs is not sent either
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    ignored = labels == ignore_index
    own = ~ignored & (labels >= shard.start) & (labels < shard.start + weight.shape[0])
    # Any label will do where another process has the right one.
    local = torch.where(own, labels - shard.start, 0).masked_fill(ignored, IGNORED)
    logps, lse = _apply(hidden, weight, bias, local, own, shard, transform, scratch_bytes)
    if not compact:
        outside = ~ignored & ((labels < 0) | (labels >= shard.total))
        logps = logps.masked_fill(outside, torch.nan).masked_fill(ignored, 0)
        lse = lse.masked_fill(ignored, 0)
    if rows is None:
        return logps, lse
    return tuple(one.new_zeros(count).index_copy(0, rows, one) for one in (logps, lse))  # type: ignore[return-value]  # one for each of two


def _apply(*arguments: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _ShardedLogps.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class _ShardedLogps(Function):
    """The operator under `linear_logps` on each shard, its numbers joined over the processes.

    Its backward takes whatever logsumexp it is given: with that of the whole vocabulary, every
    probability in it is that of the whole vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        own: Tensor,  # (N,) bool: the label is in this shard
        shard: VocabShard,
        transform: LogitTransform,
        scratch_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        logps, lse, _, cache = linear_logps_op(
            hidden, weight, bias, labels, *transform, IGNORED, False, False, scratch_bytes
        )
        candidates, lse = _of_all_shards(logps, lse, shard.group)
        ctx.shard, ctx.transform = shard, transform
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, own, candidates, lse, cache)
        return _sum(candidates.masked_fill(~own, 0), shard.group), lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logps_gradient: Tensor | None, lse_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, own, logps, lse, cache = ctx.saved_tensors
        if labels is not None and logps_gradient is not None:
            # Of a label elsewhere only its logsumexp is here, which it takes from its logit.
            elsewhere = logps_gradient.masked_fill(own, 0)
            logps_gradient = logps_gradient.masked_fill(~own, 0)
            lse_gradient = -elsewhere if lse_gradient is None else lse_gradient - elsewhere
        wanted = ctx.needs_input_grad[:3]
        found = linear_logps_backward_op(
            logps_gradient, lse_gradient, hidden, weight, bias, labels, logps, lse, cache,
            *ctx.transform, IGNORED, False, *wanted,
        )  # fmt: skip
        if wanted[0]:
            dist.all_reduce(found[0], group=ctx.shard.group)
        gradients = (one if want else None for one, want in zip(found, wanted, strict=True))
        return *gradients, *(None,) * 5


def _of_all_shards(logps: Tensor, lse: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-probabilities and logsumexp (N,) within a shard, as they are in the whole vocabulary.

    What the other shards add to a label's own is added to its log-probability, too: no difference
    of large numbers where the model is certain.
    """
    if not lse.numel():
        return logps, lse
    every = lse.new_empty(dist.get_world_size(group), *lse.shape)
    dist.all_gather(list(every.unbind(0)), lse, group=group)
    total = every.logsumexp(0)
    if not logps.numel():
        return logps, total
    every[dist.get_rank(group)] = -torch.inf
    # log(1 + exp(x)), whose own function stops counting at x = 20: too early for float64.
    difference = every.logsumexp(0) - lse
    logps = logps - torch.logaddexp(difference, torch.zeros_like(difference))
    # A shard that is masked as a whole, as padding of the vocabulary is.
    return logps.masked_fill(lse == -torch.inf, -torch.inf), total


def _sum(values: Tensor, group: ProcessGroup) -> Tensor:
    if values.numel():
        dist.all_reduce(values, group=group)
    return values
