"""The arguments every function with a head shares: their types, their checks, their meaning.

========================  ================================================================
``bias``                  (V,) added to the projection; None for none
``temperature``           divides the logits (> 0)
``logit_scale``           multiplies the projection, as in Cohere and Granite
``softcap``               ``softcap * tanh(x / softcap)``, as in Gemma (> 0); None for none
``compact``               project labelled rows only, at one read by the host in forward and,
                          where the head trains, one more in backward; ``False`` never waits
                          for the device (CUDA graphs), projects every row and answers NaN
                          where a label is outside the vocabulary
``scratch_bytes``         where the head trains: keep exponentials for backward in at most so
                          many bytes instead of computing them again; what is held is sized
                          by all rows, labelled or not
========================  ================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastpref.checks import (
    check_flag,
    check_floating,
    check_head,
    check_ignore_index,
    check_number,
    refuse,
)
from fastpref.ops.linear_logps_op import linear_logps_op
from fastpref.ops.transform import LogitTransform

if TYPE_CHECKING:
    from fastpref.ops.vocab_shard import VocabShard


class HeadOptions(TypedDict, total=False):
    """Keyword arguments that every loss passes on to `linear_logps`."""

    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None
    compact: bool
    scratch_bytes: int


OPTIONS = frozenset(HeadOptions.__annotations__)


def check_options(function: str, options: HeadOptions) -> None:
    """Refuse keyword arguments that no head has in the name of the function that was called."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def call_head(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor | None,  # (...) int64
    *,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int = 0,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Check and cast the arguments, run the operator.

    With ``shard``, ``weight`` and ``bias`` are this process's part of a head, ``labels`` are not.

    Returns (...) log-probabilities and (...) ``temperature * logsumexp``.
    """
    if isinstance(scratch_bytes, bool) or not isinstance(scratch_bytes, int) or scratch_bytes < 0:
        refuse("scratch_bytes", "a whole number of bytes, at least 0", repr(scratch_bytes))
    if _is_distributed(hidden, weight, bias):
        from fastpref.ops.placements import local_head

        hidden, weight, bias, shard = local_head(hidden, weight, bias)
    hidden, weight, bias, transform = prepare_head(
        hidden, weight, bias, temperature, logit_scale, softcap, ignore_index, compact
    )
    wants_gradient = torch.is_grad_enabled()
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    scratch_bytes = scratch_bytes if wants_gradient and trains_head else 0
    shape = hidden.shape[:-1]
    rows = hidden.reshape(-1, hidden.shape[-1])
    row_labels = None if labels is None else labels.reshape(-1)
    if shard is None:
        jacobian = wants_gradient and hidden.requires_grad and not trains_head
        logps, lse, _, _ = linear_logps_op(
            rows, weight, bias, row_labels, *transform,
            ignore_index, compact, jacobian, scratch_bytes,
        )  # fmt: skip
    else:
        from fastpref.ops.vocab_shard import sharded_logps

        logps, lse = sharded_logps(
            rows, weight, bias, row_labels, shard, transform, ignore_index, compact, scratch_bytes
        )
    values = lse.view(shape) if temperature == 1 else lse.view(shape) * transform.temperature
    return logps if labels is None else logps.view(shape), values


def prepare_head(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor | None, LogitTransform]:
    """Check what every function with a head takes; cast the operands as autocast wants them.

    A head that is spread over processes is gathered, unless it is sharded over the vocabulary.
    """
    if _is_distributed(hidden, weight, bias):
        from fastpref.ops.placements import local_head

        hidden, weight, bias, shard = local_head(hidden, weight, bias)
        if shard is not None:
            refuse("weight", 'a head that is not sharded over a mesh\'s "tp"', "one that is")
    temperature = check_number("temperature", temperature, above=0)
    logit_scale = check_number("logit_scale", logit_scale)
    if softcap is not None:
        softcap = check_number("softcap", softcap, above=0)
    check_ignore_index(ignore_index)
    check_flag("compact", compact)
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if bias is not None:
        check_floating("bias", bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check_head(hidden, weight, bias)
    _refuse_tangents(hidden, weight, bias)
    return hidden, weight, bias, LogitTransform(temperature, logit_scale, softcap)


def _is_distributed(*tensors: Tensor | None) -> bool:
    """Whether a ``DTensor`` is among them, without an import of what most never use."""
    return any(type(tensor).__name__ == "DTensor" for tensor in tensors)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Refuse forward-mode derivatives, which a custom operator would silently take for zero."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]  # torch's own
            raise NotImplementedError("fastpref has no forward-mode derivatives (jvp, jacfwd)")


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``torch.nn.functional.linear`` does to its arguments under autocast."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)
