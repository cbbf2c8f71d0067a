"""Compile Triton kernels for a GPU that need not be there, and count instructions for each logit.

A launcher runs on CPU tensors with its kernel replaced by a recorder. What it would have launched
is compiled ahead of time, and the machine code is read.
"""

import inspect
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpref.kernels import tiles
from fastpref.kernels.numerics import Transform

HOPPER = GPUTarget("cuda", 90, 32)
TILE_WIDTH = 4096
ROWS = 16  # of a tile, one block of the grid each
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


class Launch(NamedTuple):
    """The arguments and options of one launch, recorded in place of running it."""

    kernel: Any  # triton.JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    predicate: str | None
    name: str
    operands: str


@contextmanager
def recording(module: ModuleType, name: str) -> Iterator[list[Launch]]:
    """Within, launches of `module.name` are recorded in the list, not run."""
    kernel = getattr(module, name)
    launches: list[Launch] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Any:
            def launch(*args: object, **kwargs: Any) -> None:
                options = {key: kwargs.pop(key) for key in LAUNCH_OPTIONS if key in kwargs}
                bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
                launches.append(Launch(kernel, dict(bound.arguments), options))

            return launch

    with mock.patch.object(module, name, Recorder()):
        yield launches


def compile_launch(launch: Launch, target: GPUTarget) -> Any:  # triton.compiler.CompiledKernel
    """Compile as Triton does at run time: pointers aligned; integers of 1 and None fixed."""
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        fixed = parameter.is_constexpr or value is None
        if fixed or (isinstance(value, int) and value == 1 and specialized):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, TensorDescriptor):
            element = POINTERS[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{element}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[position,] = [["tt.divisibility", 16]]
            if target.backend == "hip":
                attributes[position,].append(["tt.pointer_range", 32])
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and specialized:
                attributes[position,] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, float), parameter.name
            signature[parameter.name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers (REG), SHARED memory and what was spilled (STACK, LOCAL), for each thread."""
    report = _cuobjdump(cubin, "--dump-resource-usage")
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", report)}


def fold_launch(dtype: torch.dtype, transform: Transform, width: int = TILE_WIDTH) -> Launch:
    """A tile with labels is folded, and its exponentials are written in `dtype`."""
    tile, labels, start = _tile(width)
    reference, sum_exp, target_logit = (torch.empty(ROWS) for _ in range(3))
    with recording(tiles, "_fold_tile_kernel") as launches:
        tiles.fold_tile(
            tile, labels, start, transform, reference, sum_exp, target_logit,
            exponentials=torch.empty(ROWS, width, dtype=dtype),
        )  # fmt: skip
    return launches[0]


def gradient_launch(dtype: torch.dtype, transform: Transform, width: int = TILE_WIDTH) -> Launch:
    """The gradient of a tile with labels is written in `dtype`."""
    tile, labels, start = _tile(width)
    reference, coefficients, label_gradients = (torch.empty(ROWS) for _ in range(3))
    with recording(tiles, "_gradient_tile_kernel") as launches:
        tiles.gradient_tile(
            tile, labels, start, transform, reference, coefficients, label_gradients,
            torch.empty(ROWS, width, dtype=dtype),
        )  # fmt: skip
    return launches[0]


def _tile(width: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A tile, labels and the tile's first column."""
    return torch.empty(ROWS, width), torch.zeros(ROWS, dtype=torch.int64), width


def instructions_per_logit(launch: Launch, target: GPUTarget = HOPPER) -> float:
    """Instructions that a thread runs, divided by its logits; `launch` has a row in each block.

    The shortest way through the code that passes every access to 16 bytes or more of memory: that
    of a row whose label is in another tile, and whose reference stays. Without `earlier`, as
    the code that rescales it has such accesses, too.
    """
    code = machine_code(compile_launch(launch, target).asm["cubin"])
    followers = _followers(code)
    wide = re.compile(r"(LDG|STG)\.E\S*\.(128|256)")
    milestones = [index for index, one in enumerate(code) if wide.match(one.name)]
    assert milestones, "no memory is read 16 bytes at a time"
    end = [
        index
        for index, one in enumerate(code)
        if one.name.startswith("EXIT") and one.predicate is None
    ]
    here, total = 0, 1
    for goals in [*([index] for index in milestones), end]:
        steps, here = _shortest(followers, here, goals)
        total += steps
    threads = 32 * launch.options["num_warps"]
    return total * threads / int(launch.arguments["BLOCK"])


def machine_code(cubin: bytes) -> list[Instruction]:
    """The instructions of a kernel in the order of their addresses."""
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z]\S*)\s*(.*?);")
    found = (line.match(text) for text in _cuobjdump(cubin, "--dump-sass").splitlines())
    return [Instruction(int(one[1], 16), *one.group(2, 3, 4)) for one in found if one]


def _followers(code: list[Instruction]) -> list[list[int]]:
    """For each instruction those that may come next."""
    index_at = {one.address: index for index, one in enumerate(code)}
    followers = []
    for index, one in enumerate(code):
        conditional = one.predicate is not None or one.operands.startswith(("P", "!P", "U", "!U"))
        after = [index + 1] if index + 1 < len(code) else []
        if one.name.startswith("BRA"):
            target = re.search(r"0x[0-9a-f]+", one.operands)
            assert target is not None, one
            after = [index_at[int(target[0], 16)], *(after if conditional else [])]
        elif one.name.startswith("EXIT") and one.predicate is None:
            after = []
        followers.append(after)
    return followers


def _shortest(followers: list[list[int]], start: int, goals: list[int]) -> tuple[int, int]:
    """Steps from `start` to the nearest of `goals`, and which that is."""
    steps = {start: 0}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        if here in goals:
            return steps[here], here
        for one in followers[here]:
            if one not in steps:
                steps[one] = steps[here] + 1
                queue.append(one)
    raise ValueError("no way through the code passes every wide access in turn")


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
