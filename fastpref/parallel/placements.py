"""What each process makes of a head that is a ``DTensor``.

A mesh dimension named ``"tp"`` splits one computation: its processes have the same hidden states,
and a head sharded over it stays where it is. Every other dimension splits the data, as FSDP2's do:
there the head is gathered, and its gradient is the mean over the processes, as FSDP2 reduces it.
The mean is right as well where a mesh without names is tensor-parallel: all have the same gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fastpref.checks import refuse
from fastpref.parallel.vocab_shard import VocabShard

TENSOR_PARALLEL = "tp"


class LocalHead(NamedTuple):
    """Plain tensors that this process computes with."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H), or this process's rows of it
    bias: Tensor | None  # (V,), or this process's numbers of it
    shard: VocabShard | None  # where the head is only a part of the vocabulary


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = ""
) -> LocalHead:
    """The plain tensors behind arguments of which some are a ``DTensor``."""
    shard = _shard(weight)
    if bias is not None and _shard(bias) != shard:
        expected = f"the same shard of the vocabulary as {prefix}weight"
        refuse(f"{prefix}bias", expected, _words(bias))
    return LocalHead(
        _local_hidden(f"{prefix}hidden", hidden),
        _local_part(f"{prefix}weight", weight),
        None if bias is None else _local_part(f"{prefix}bias", bias),
        shard,
    )


def _local_hidden(name: str, hidden: Tensor) -> Tensor:
    if not isinstance(hidden, DTensor):
        return hidden
    if not all(placement.is_replicate() for placement in hidden.placements):
        refuse(name, "a plain tensor (.to_local()) or a replicated DTensor", _words(hidden))
    local: Tensor = hidden.to_local()
    return local


def _local_part(name: str, tensor: Tensor) -> Tensor:
    """Gather over the dimensions that split the data, leave the tensor-parallel one alone."""
    if not isinstance(tensor, DTensor):
        return tensor
    splits_data = [dimension != TENSOR_PARALLEL for dimension in _dimension_names(tensor)]
    for placement, splits in zip(tensor.placements, splits_data, strict=True):
        if not (placement.is_replicate() or _splits_rows(placement, anyhow=splits)):
            expected = "a DTensor placed by Shard(0), over the vocabulary, or Replicate()"
            refuse(name, expected, _words(tensor))
    wanted: list[Placement] = []
    of_gradient: list[Placement] = []
    for placement, splits in zip(tensor.placements, splits_data, strict=True):
        wanted.append(Replicate() if splits else placement)
        of_gradient.append(Partial() if splits else placement)
    gathered = tensor.redistribute(placements=wanted).to_local(grad_placements=of_gradient)
    sizes = zip(tensor.device_mesh.shape, splits_data, strict=True)
    processes = math.prod(size for size, splits in sizes if splits)
    if processes == 1:
        return gathered
    mean: Tensor = _DivideGradient.apply(gathered, processes)  # type: ignore[no-untyped-call]  # autograd's own
    return mean


def _splits_rows(placement: Placement, *, anyhow: bool) -> bool:
    """Into one part after the other, or ``anyhow``, as FSDP2 does over a tensor-parallel shard."""
    return getattr(placement, "dim", None) == 0 and (anyhow or type(placement) is Shard)


def _shard(tensor: Tensor) -> VocabShard | None:
    """Which part of the vocabulary a tensor-parallel process has; None for all of it."""
    if not isinstance(tensor, DTensor):
        return None
    mesh, names = tensor.device_mesh, _dimension_names(tensor)
    if TENSOR_PARALLEL not in names:
        return None
    if not _splits_rows(tensor.placements[names.index(TENSOR_PARALLEL)], anyhow=False):
        return None
    total, processes = tensor.shape[0], mesh.size(names.index(TENSOR_PARALLEL))
    step = -(-total // processes)  # as torch.chunk has it
    sizes = tuple(min(step, max(total - step * rank, 0)) for rank in range(processes))
    return VocabShard(mesh.get_group(TENSOR_PARALLEL), sizes)


def _dimension_names(tensor: DTensor) -> tuple[str, ...]:
    mesh = tensor.device_mesh
    return mesh.mesh_dim_names or ("",) * mesh.ndim


def _words(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return "a plain tensor"
    return f"{tensor.placements} on the mesh {_dimension_names(tensor)}"


class _DivideGradient(Function):
    """Autograd sums over processes; gloo has no mean, so the gradient is divided ahead of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None
