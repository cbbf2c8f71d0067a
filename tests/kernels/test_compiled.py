"""Every shipped launch compiles for every target, fits its shared memory, and spills nothing.

No device is needed: the launchers run on CPU tensors with their kernels replaced by a recorder, and
what they would have launched is compiled ahead of time.
"""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("needs the compiler: TRITON_INTERPRET is on", allow_module_level=True)

import triton.backends.nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fastpref.kernels import launch, logsumexp, tiles  # noqa: E402
from fastpref.kernels import pair_losses as kernel_of_pairs  # noqa: E402

KIB = 1024
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    """The arguments and options of one launch, recorded in place of running it."""

    kernel: triton.JITFunction
    arguments: dict[str, object]
    options: dict[str, int]


class Binary(NamedTuple):
    """What the compiler says about one compiled kernel."""

    assembly: str
    shared: int
    spills: dict[str, int]


def record(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[Launch]:
    """Launches of `module.name` from now on are recorded in the returned list, not run."""
    kernel = getattr(module, name)
    launches: list[Launch] = []

    class Recorder:
        def __getitem__(self, grid: object):
            def launch(*args: object, **kwargs: object) -> None:
                options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
                bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
                launches.append(Launch(kernel, dict(bound.arguments), options))

            return launch

    monkeypatch.setattr(module, name, Recorder())
    return launches


def compile_launch(launch: Launch, target: GPUTarget) -> Binary:
    """`launch` specialised as Triton does at run time (aligned pointers, ones and None fixed)."""
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
    compiled = triton.compile(source, target=target, options=launch.options)
    if target.backend == "hip":
        # Scalar registers spill into lanes of vector registers, not to memory: not counted.
        assembly = report = compiled.asm["amdgcn"]
        pattern = r"(\.vgpr_spill_count|ScratchSize): +(\d+)"
    else:
        assembly, report = compiled.asm["ptx"], resource_usage(compiled.asm["cubin"])
        pattern = r"(STACK|LOCAL):(\d+)"
    spills = {name: int(number) for name, number in re.findall(pattern, report)}
    assert len(spills) == 2, f"the compiler reports only {spills}"
    return Binary(assembly, compiled.metadata.shared, spills)


def resource_usage(cubin: bytes) -> str:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Transform(NamedTuple):
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


def projection(dtype: torch.dtype, n_rows: int, variant: str) -> None:
    """One launch: "plain"; with "everything"; or that with operands of awkward strides.

    Everything is bias, labels, gathered rows, softcap and a hidden size that no block divides.
    """
    plain = variant == "plain"
    hidden_size = {"plain": 1024, "unaligned": 1001}.get(variant, 1008)
    hidden = torch.empty(n_rows, hidden_size, dtype=dtype)
    weight = torch.empty(512, hidden_size, dtype=dtype)
    if variant == "transposed":
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    positions = torch.zeros(n_rows, dtype=torch.int64)
    logsumexp.projection_logsumexp(
        hidden,
        weight,
        None if plain else torch.empty(512, dtype=dtype),
        None if plain else positions,
        None if plain else positions,
        Transform(softcap=None if plain else 30.0),
    )


def fold(dtype: torch.dtype | None, everything: bool, stats: bool = False) -> None:
    n, width = 16, 4096
    running = [torch.empty(n) if stats or number < 3 else None for number in range(5)]
    exponentials = None if dtype is None else torch.empty(n, width, dtype=dtype)
    rescale = None if dtype is None else torch.empty(n)
    labels = torch.zeros(n, dtype=torch.int64) if everything else None
    transform = Transform(softcap=30.0 if everything else None)
    tile = torch.empty(n, width)
    tiles.fold_tile(tile, labels, 4096, transform, *running, exponentials, rescale)


def gradient(dtype: torch.dtype, everything: bool) -> None:
    n, width = 16, 4096
    out = torch.empty(n, width, dtype=dtype)
    labels = torch.zeros(n, dtype=torch.int64) if everything else None
    transform = Transform(softcap=30.0 if everything else None)
    vectors = [torch.empty(n) for _ in range(3)]
    tiles.gradient_tile(torch.empty(n, width), labels, 4096, transform, *vectors, out)


def pair_losses(loss: str, everything: bool, offsets_dtype: torch.dtype) -> None:
    kernel_of_pairs.pair_losses(
        loss,
        torch.empty(64),
        torch.empty(64, dtype=torch.bool),
        torch.zeros(5, dtype=offsets_dtype),
        torch.empty(64) if everything else None,
        torch.empty(4) if everything else None,
        torch.empty(4) if everything else None,
        0.1,
        2.0,
        0.3,
        length_normalize=everything,
    )


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PROJECTION = (logsumexp, "_projection_logsumexp_kernel")
FOLD = (tiles, "_fold_tile_kernel")
GRADIENT = (tiles, "_gradient_tile_kernel")
PAIRS = (kernel_of_pairs, "_pairs_kernel")


def cases() -> Iterator[tuple[str, tuple, Callable[..., None], tuple]]:
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        # The float16 code is that of bfloat16 but for one instruction: one variant is enough.
        variants = ["plain", "everything", "unaligned", "transposed"]
        for variant in ["everything"] if dtype == torch.float16 else variants:
            for rows in (64, 4096):
                yield f"projection-{name}-{rows}-{variant}", PROJECTION, projection, (
                    dtype, rows, variant,
                )  # fmt: skip
        yield f"fold-{name}", FOLD, fold, (dtype, True)
        yield f"fold-{name}-stats", FOLD, fold, (dtype, True, True)
        yield f"gradient-{name}", GRADIENT, gradient, (dtype, True)
    yield "fold-statistics", FOLD, fold, (None, False)
    yield "fold-statistics-stats", FOLD, fold, (None, False, True)
    yield "gradient-plain", GRADIENT, gradient, (torch.bfloat16, False)
    for loss in kernel_of_pairs.LOSSES:
        yield f"{loss}-plain", PAIRS, pair_losses, (loss, False, torch.int64)
        yield f"{loss}-everything", PAIRS, pair_losses, (loss, True, torch.int32)


CASES = [pytest.param(*case[1:], id=case[0]) for case in cases()]


def compiled(
    monkeypatch: pytest.MonkeyPatch, target: str, kernel: tuple, call: Callable, arguments: tuple
) -> Binary:
    gpu, _ = TARGETS[target]
    monkeypatch.setattr(launch, "backend", lambda: gpu.backend)
    launches = record(monkeypatch, *kernel)
    call(*arguments)
    (recorded,) = launches
    return compile_launch(recorded, gpu)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kernel", "call", "arguments"), CASES)
def test_fits_and_spills_nothing(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    kernel: tuple,
    call: Callable,
    arguments: tuple,
) -> None:
    binary = compiled(monkeypatch, target, kernel, call, arguments)
    assert not any(binary.spills.values()), binary.spills
    _, shared_limit = TARGETS[target]
    assert binary.shared <= shared_limit


@pytest.mark.parametrize("rows", [64, 4096])
def test_hopper_projection_uses_its_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    arguments = (torch.bfloat16, rows, "everything")
    binary = compiled(monkeypatch, "sm_90", PROJECTION, projection, arguments)
    assert "wgmma.mma_async" in binary.assembly
