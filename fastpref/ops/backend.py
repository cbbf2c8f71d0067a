"""Which code runs on which device, and in which dtypes.

Triton kernels run where they can, PyTorch everywhere else. Matrix products keep float32 sums of
float16 and bfloat16 operands.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from fastpref.ops import torch_tiles

try:
    import triton
except ImportError:  # Triton ships with PyTorch on Linux only
    triton = None

TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels serve this tensor; ``TRITON_INTERPRET=1`` runs them on the CPU."""
    if triton is None or tensor.dtype == torch.float64:
        return False
    return tensor.device.type in TRITON_DEVICES or os.environ.get("TRITON_INTERPRET") == "1"


def tile_functions(tensor: Tensor) -> ModuleType:
    """The module whose ``fold_tile`` and ``gradient_tile`` serve this tensor."""
    if not uses_triton(tensor):
        return torch_tiles
    from fastpref.kernels import tiles as triton_tiles

    return triton_tiles


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled for a device; PyTorch answers for those that have it only."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which matrix products take their operands.

    CUDA multiplies 16-bit operands into float32 sums. Elsewhere PyTorch rounds the product to 16
    bits, which costs up to 6 % of a probability, so operands are widened first.
    """
    return tensor.dtype if tensor.device.type == "cuda" else statistics_dtype(tensor.dtype)


def multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out = left @ right``, or ``out += left @ right`` with ``add``.

    ``left`` (n, k) has the dtype that `operand_dtype` gives and ``right`` (k, m) any; ``out``
    (n, m) may be wider than both.
    """
    right = right.to(left.dtype)
    # Before PyTorch 2.10 addmm with out_dtype refused a float32 sum to add to.
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
