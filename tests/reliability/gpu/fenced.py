"""Tensors with a fence: on a CPU, whoever reads or writes beyond one ends the process (SIGSEGV).

Stands in for memcheck where kernels are interpreted. Memory that nobody has written to is NaN,
which stands in for initcheck.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = mmap.PAGESIZE
C = ctypes.CDLL(None, use_errno=True)
FRESH = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like}


class Fenced(TorchDispatchMode):
    """Every tensor that is made inside ends where its memory does ("after"), or begins there."""

    def __init__(self, side: str):
        super().__init__()
        self.side = side

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        # Views and what is written in place are in memory that has its fence.
        if len(returned) != 1 or returned[0].alias_info or not isinstance(found, Tensor):
            return found
        return fence(found, self.side, fresh=func.overloadpacket in FRESH)


def fence(tensor: Tensor, side: str, *, fresh: bool) -> Tensor:
    """A copy of a tensor, of the same strides, next to a page that nobody may touch."""
    size = tensor.untyped_storage().nbytes()
    if size == 0:
        return tensor
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fence_at, start = (
        (first + pages * PAGE, pages * PAGE - size) if side == "after" else (first, PAGE)
    )
    if C.mprotect(ctypes.c_void_p(fence_at), ctypes.c_size_t(PAGE), 0):  # PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")
    storage = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=size)
    whole = storage.view(tensor.dtype)
    if fresh:
        storage.fill_(255)  # NaN
    else:
        whole.copy_(torch.as_strided(tensor, whole.shape, (1,), 0))
    offset = tensor.storage_offset() + whole.storage_offset()
    return whole.as_strided(tensor.shape, tensor.stride(), offset)
