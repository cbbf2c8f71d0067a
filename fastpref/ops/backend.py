"""Which code runs on which device: Triton kernels where they can run, PyTorch everywhere else."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from fastpref.ops import tiles as torch_tiles

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
