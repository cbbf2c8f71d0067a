"""Every shipped launch compiles for every target, fits its shared memory, and spills nothing.

No device is needed: the launchers run on CPU tensors with their kernels replaced by a recorder, and
what they would have launched is compiled ahead of time.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("needs the compiler: TRITON_INTERPRET is on", allow_module_level=True)

from instructions import (  # noqa: E402
    HOPPER,
    Launch,
    compile_launch,
    fold_launch,
    gradient_launch,
    instructions_per_logit,
    recording,
    resource_usage,
)
from triton.backends.compiler import GPUTarget  # noqa: E402

from fastpref.kernels import launch, logsumexp, tiles  # noqa: E402
from fastpref.kernels import pair_losses as kernel_of_pairs  # noqa: E402

KIB = 1024
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (HOPPER, 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


# Bytes a thread. Tiles were chosen with Triton 3.7; the code that 3.5 makes of them needs one or
# two registers more than a thread has, in four configurations.
ALLOWED_SPILLS = {"3.5": 8}.get(".".join(triton.__version__.split(".")[:2]), 0)


class Binary(NamedTuple):
    """What the compiler says about one compiled kernel."""

    assembly: str
    shared: int
    spills: dict[str, int]


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


def fold(dtype: torch.dtype | None, variant: str, width: int = 4096) -> None:
    """One launch: "plain"; with "everything"; or that with the numbers of "statistics".

    Everything is labels, a soft cap, and earlier exponentials and their product to be rescaled.
    """
    n, plain = 16, variant == "plain"
    numbers = [
        torch.empty(n) if number < 3 or variant == "statistics" else None for number in range(5)
    ]
    exponentials = None if dtype is None else torch.empty(n, width, dtype=dtype)
    earlier = (
        () if plain or dtype is None else (torch.empty(n, 2048), torch.empty(n, 64, dtype=dtype))
    )
    labels = None if plain else torch.zeros(n, dtype=torch.int64)
    transform = Transform(softcap=None if plain else 30.0)
    tile = torch.empty(n, width)
    tiles.fold_tile(tile, labels, 4096, transform, *numbers, exponentials, earlier)


def gradient(dtype: torch.dtype, plain: bool, width: int = 4096) -> None:
    n = 16
    out = torch.empty(n, width, dtype=dtype)
    labels = None if plain else torch.zeros(n, dtype=torch.int64)
    transform = Transform(softcap=None if plain else 30.0)
    vectors = [torch.empty(n) for _ in range(3)]
    tiles.gradient_tile(torch.empty(n, width), labels, 4096, transform, *vectors, out)


def kept(dtype: torch.dtype) -> None:
    n, width = 16, 4096
    labels, vectors = torch.zeros(n, dtype=torch.int64), [torch.empty(n) for _ in range(4)]
    exponentials, out = (torch.empty(n, width, dtype=dtype) for _ in range(2))
    tiles.gradient_of_kept_tile(exponentials, labels, 4096, *vectors, out)


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
KEPT = (tiles, "_gradient_of_kept_tile_kernel")
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
        for variant in ("everything", "statistics"):
            yield f"fold-{name}-{variant}", FOLD, fold, (dtype, variant)
        yield f"kept-{name}", KEPT, kept, (dtype,)
        yield f"gradient-{name}", GRADIENT, gradient, (dtype, False)
    # A tail of the vocabulary, one block of many warps, and several blocks that none divides.
    for width in (7, 8192, 50257):
        for variant in ("everything", "statistics"):
            yield f"fold-{width}-{variant}", FOLD, fold, (torch.bfloat16, variant, width)
        yield f"gradient-{width}", GRADIENT, gradient, (torch.bfloat16, False, width)
    yield "fold-alone", FOLD, fold, (None, "plain")
    yield "fold-alone-statistics", FOLD, fold, (None, "statistics")
    yield "fold-plain", FOLD, fold, (torch.bfloat16, "plain")
    yield "gradient-plain", GRADIENT, gradient, (torch.bfloat16, True)
    for loss in kernel_of_pairs.LOSSES:
        yield f"{loss}-plain", PAIRS, pair_losses, (loss, False, torch.int64)
        yield f"{loss}-everything", PAIRS, pair_losses, (loss, True, torch.int32)


CASES = [pytest.param(*case[1:], id=case[0]) for case in cases()]


def compiled(
    monkeypatch: pytest.MonkeyPatch, target: str, kernel: tuple, call: Callable, arguments: tuple
) -> Binary:
    gpu, _ = TARGETS[target]
    monkeypatch.setattr(launch, "backend", lambda: gpu.backend)
    with recording(*kernel) as launches:
        call(*arguments)
    (recorded,) = launches
    assert recorded.options["enable_fp_fusion"] is True, "Triton 3.10 has another default"
    found = compile_launch(recorded, gpu)
    if gpu.backend == "hip":
        # Scalar registers spill into lanes of vector registers, not to memory: not counted.
        assembly = found.asm["amdgcn"]
        spilled = re.findall(r"(\.vgpr_spill_count|ScratchSize): +(\d+)", assembly)
        spills = {name: int(number) for name, number in spilled}
        assert len(spills) == 2, f"the compiler reports only {spills}"
    else:
        assembly, usage = found.asm["ptx"], resource_usage(found.asm["cubin"])
        spills = {name: usage[name] for name in ("STACK", "LOCAL")}
    return Binary(assembly, found.metadata.shared, spills)


def assert_spills_nothing(binary: Binary) -> None:
    assert max(binary.spills.values()) <= ALLOWED_SPILLS, binary.spills


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
    assert_spills_nothing(binary)
    _, shared_limit = TARGETS[target]
    assert binary.shared <= shared_limit


@pytest.mark.parametrize("rows", [64, 4096])
def test_hopper_projection_uses_its_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    arguments = (torch.bfloat16, rows, "everything")
    binary = compiled(monkeypatch, "sm_90", PROJECTION, projection, arguments)
    assert "wgmma.mma_async" in binary.assembly


# The most that a row of a tile may cost. Before its kernels read a row once and compared no column
# with a label they took 38.4 and 20.8 instructions, 86.7 and 49.6 with a soft cap.
@pytest.mark.parametrize(
    ("recorded", "transform", "most"),
    [
        (fold_launch, Transform(), 9.0),
        (fold_launch, Transform(temperature=0.7), 10.0),
        (fold_launch, Transform(softcap=30.0), 26.5),
        (gradient_launch, Transform(), 6.2),
        (gradient_launch, Transform(temperature=0.7), 6.2),
        (gradient_launch, Transform(softcap=30.0), 22.5),
    ],
)
def test_instructions_per_logit(
    recorded: Callable[..., Launch], transform: Transform, most: float
) -> None:
    assert instructions_per_logit(recorded(torch.bfloat16, transform)) <= most
