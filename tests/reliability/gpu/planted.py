"""Kernels with an error each, which a tool must see before its silence means anything."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64


@triton.jit
def _read_beyond_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Reads 64 numbers of 61."""
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index))


@triton.jit
def _race_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """All threads write to one place in shared memory, and read it with nothing in between."""
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    found = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b32 place;
        st.volatile.shared.b32 [place], $1;
        ld.volatile.shared.b32 $0, [place];
        }""",
        "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(out_ptr + index, found)


@triton.jit
def _divergent_barrier_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Half of the threads of each warp wait for all."""
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    found = tl.inline_asm_elementwise(
        """{
        .reg .pred waits;
        .reg .b32 lane;
        mov.u32 lane, %laneid;
        setp.lt.u32 waits, lane, 16;
        @waits bar.sync 0;
        mov.b32 $0, $1;
        }""",
        "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(out_ptr + index, found)


def _launch(kernel: object, x: Tensor) -> Tensor:
    out = torch.zeros(BLOCK, device=x.device)
    kernel[(1,)](x, out, BLOCK=BLOCK, num_warps=2)
    return out


# By the tool that must see it; each returns what the kernel wrote.
PLANTED = {
    "memcheck": lambda device: _launch(_read_beyond_kernel, torch.zeros(BLOCK - 3, device=device)),
    "racecheck": lambda device: _launch(_race_kernel, torch.arange(64.0, device=device)),
    "initcheck": lambda device: _launch(_read_beyond_kernel, torch.empty(BLOCK, device=device)),
    "synccheck": lambda device: _launch(_divergent_barrier_kernel, torch.zeros(64, device=device)),
}
