"""Per-token log-probabilities of a head whose rows are spread over a process group."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from fastpref.checks import check_floating, check_labels, check_shape, refuse
from fastpref.ops.head import call_head
from fastpref.ops.vocab_shard import VocabShard


@overload
def vocab_parallel_logps(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    compact: bool = ...,
    scratch_bytes: int = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def vocab_parallel_logps(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    compact: bool = ...,
    scratch_bytes: int = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def vocab_parallel_logps(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`linear_logps` of a head whose rows are spread over processes (Megatron's tensor parallel).

    .. math:: \log \pi(y_t) = z_{t, y_t} - \log \sum_r \sum_{j \in V_r} \exp z_{t,j}

    Every process of ``group`` calls it with the same hidden states and labels; the head stays where
    it is. On its own rows each takes one matrix product forward, and backward one more than
    gradients are wanted: three where the head is frozen, four where it trains. It sends an int64,
    then an all-gather and an all-reduce of n float32 numbers (n labelled tokens), and backward an
    all-reduce of (n, H).

    Args:
        hidden: (..., H) the same on every process; float64, float32, float16 or bfloat16. Its
            gradient is complete on every process.
        weight_shard: (v, H) this process's rows of the head, those of all processes end to end in
            the order of their ranks; v may differ. Its gradient stays local.
        labels: (...) integers in the whole vocabulary, the same on every process.
        group: The processes that share the head.
        bias: (v,) this process's, or None.
        temperature: As `linear_logps`, like all that follows.
        logit_scale: Multiplies the projection.
        softcap: ``softcap * tanh(x / softcap)``.
        ignore_index: The label of positions to leave out.
        compact: Project labelled rows only; ``False`` projects every row, and the host waits only
            for the processes' numbers of rows v.
        scratch_bytes: Where the head trains, keep exponentials for backward in at most so many.
        return_lse: Also return ``temperature * logsumexp(z)`` of the whole vocabulary.

    Returns:
        As `linear_logps`, the same on every process.

    Raises:
        ValueError: As `linear_logps`; arguments that are ``DTensor``, which `linear_logps` takes.

    Example:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()  # one process here: its shard is the head
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> hidden, labels = torch.randn(2, 3, 8), torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> logps = vocab_parallel_logps(hidden, torch.randn(50, 8), labels, group=dist.group.WORLD)
        >>> dist.destroy_process_group()
        >>> logps.shape, logps[0, 2].item()
        (torch.Size([2, 3]), 0.0)
    """
    check_labels(labels, hidden)
    check_shape("labels", labels, hidden.shape[:-1], "hidden without its last dimension")
    check_floating("weight_shard", weight_shard)
    for name, tensor in (("hidden", hidden), ("weight_shard", weight_shard), ("bias", bias)):
        if isinstance(tensor, DTensor):
            refuse(name, "a plain tensor (linear_logps takes this)", "a DTensor")
    if not isinstance(group, ProcessGroup):
        refuse("group", "a torch.distributed process group", type(group).__name__)
    logps, values = call_head(
        hidden,
        weight_shard,
        labels.to(torch.int64),
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        compact=compact,
        scratch_bytes=scratch_bytes,
        shard=_shard(weight_shard, group),
    )
    return (logps, values) if return_lse else logps


def _shard(weight_shard: Tensor, group: ProcessGroup) -> VocabShard:
    """This process's place in the vocabulary, which it asks the others for."""
    own = torch.tensor([weight_shard.shape[0]], device=weight_shard.device)
    every = own.new_empty(dist.get_world_size(group), 1)
    dist.all_gather(list(every.unbind(0)), own, group=group)
    sizes = every.flatten().tolist()
    return VocabShard(group, sum(sizes[: dist.get_rank(group)]), sum(sizes))
