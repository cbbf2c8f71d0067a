"""What every launcher shares: the configurations that ship, and the device to launch on."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Elementwise kernels. A block holds at least one element for each thread: with fewer, threads share
# an element, and one could read it after another has overwritten it in place.
ELEMENTS = 1024
ELEMENT_WARPS = 4

# A teacher is read at two positions a sequence: so few rows are bound by reading the weight.
FEW_ROWS = 64


class ProjectionConfig(NamedTuple):
    """Tile shape and launch options of a kernel built on `hidden @ weight.T`."""

    block_rows: int
    block_vocab: int
    block_hidden: int
    num_warps: int
    num_stages: int


# Kernels that read through descriptors. The tile is the widest whose sums fit in registers: each
# byte that it brings to a multiprocessor serves 85 operations, where 128 x 128 would do 64.
PERSISTENT_CONFIG = ProjectionConfig(128, 256, 64, 8, 4)
PERSISTENT_SHARED_BYTES = 200 * 1024


def backend() -> str:
    """Name the compiler that this build of torch launches on: "hip", "xpu" or "cuda"."""
    return "hip" if torch.version.hip else "xpu" if torch.version.xpu else "cuda"


def compile_options(*, many_registers: bool = False) -> dict[str, bool | int]:
    """How kernels are compiled, whatever is Triton's default.

    A product and the sum that follows are one instruction, rounded once: from Triton 3.10 on that
    has to be asked for. With `many_registers` NVIDIA's compiler may use nearly all of a thread's:
    by itself it spills some to have more threads at once, and allowed all 255 it spills again.
    """
    options: dict[str, bool | int] = {"enable_fp_fusion": True}
    if many_registers and backend() == "cuda":
        options["maxnreg"] = 232
    return options


def projection_config(hidden: Tensor, weight: Tensor, n_rows: int) -> ProjectionConfig:
    """Choose the shipped configuration for `n_rows` rows of `hidden` (N, H) @ `weight.T` (H, V).

    Few rows are bound by reading the weight, so their tiles are short and their pipeline deep;
    many rows are bound by arithmetic. Float32 is multiplied in full precision without tensor cores
    and needs its registers for operands. So do operands that cannot be read 16 bytes at a time:
    nothing copies these past the registers.
    """
    few = n_rows <= FEW_ROWS
    if hidden.dtype == torch.float32:
        config = ProjectionConfig(32, 32, 32, 4, 3) if few else ProjectionConfig(64, 64, 16, 8, 3)
    elif not (_is_vectorizable(hidden) and _is_vectorizable(weight)):
        config = ProjectionConfig(64, 64, 32, 4, 3)
    elif few:
        config = ProjectionConfig(64, 128, 64, 8, 4)
    else:
        config = ProjectionConfig(128, 128, 64, 8, 3)
    # CDNA has 64 KiB of shared memory, and its compiler keeps one more stage in registers.
    return config._replace(num_stages=2) if backend() == "hip" else config


def reads_through_descriptors(hidden: Tensor, weight: Tensor, n_rows: int) -> bool:
    """Whether the device copies tiles of these operands by itself (TMA: Hopper and later).

    Rows of whole 16 bytes stay describable when some of them are gathered. Blackwell's workstation
    and desktop devices have too little shared memory for the tiles.
    """
    if hidden.device.type != "cuda" or backend() == "hip" or n_rows <= FEW_ROWS:
        return False
    if torch.cuda.get_device_capability(hidden.device) < (9, 0) or hidden.dtype == torch.float32:
        return False
    properties = torch.cuda.get_device_properties(hidden.device)
    # PyTorch's stubs lack this property.
    if properties.shared_memory_per_block_optin < PERSISTENT_SHARED_BYTES:  # type: ignore[attr-defined]
        return False
    return all(
        matrix.stride(1) == 1
        and matrix.stride(0) % 8 == 0
        and matrix.shape[1] % 8 == 0
        and matrix.stride(0) >= matrix.shape[1]  # rows that overlap cannot be described
        and matrix.data_ptr() % 16 == 0
        for matrix in (hidden, weight)
    )


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once where each fills a multiprocessor; the interpreter has 4."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_vectorizable(matrix: Tensor) -> bool:
    # Triton knows of no alignment but to multiples of 16: bytes of a pointer, elements of a stride.
    return matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current, as Triton launches on the current one whatever its arguments say."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)
