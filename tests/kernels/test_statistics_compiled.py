"""The kernel under `linear_stats`, compiled for every target: it fits and spills nothing."""

from __future__ import annotations

import pytest
import torch
from test_compiled import FLOATS, TARGETS, Transform, assert_spills_nothing, compiled

from fastpref.kernels import statistics
from fastpref.ops.linear_stats_op import Sums

KERNEL = (statistics, "_projection_partials_kernel")
HIDDEN_SIZES = {"plain": 1024, "unaligned": 1001}


def statistics_of(dtype: torch.dtype, variant: str, sums: Sums) -> None:
    """One launch: "plain"; with "everything"; or that with operands of awkward strides.

    Everything is bias, labels, gathered rows, softcap and a hidden size that no block divides.
    """
    plain = variant == "plain"
    hidden_size = HIDDEN_SIZES.get(variant, 1008)
    hidden = torch.empty(64, hidden_size, dtype=dtype)
    weight = torch.empty(512, hidden_size, dtype=dtype)
    if variant == "transposed":
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    positions = torch.zeros(64, dtype=torch.int64)
    statistics.projection_partials(
        hidden,
        weight,
        None if plain else torch.empty(512, dtype=dtype),
        None if plain else positions,
        None if plain else positions,
        Transform(softcap=None if plain else 30.0),
        *sums,
    )


CASES = [
    *(
        (dtype, variant, Sums(True, True, True))
        for dtype in FLOATS
        for variant in ("plain", "everything", "unaligned", "transposed")
    ),
    *(
        (torch.bfloat16, "everything", Sums(*(one == flag for flag in range(3))))
        for one in range(4)
    ),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "variant", "sums"), CASES)
def test_fits_and_spills_nothing(
    monkeypatch: pytest.MonkeyPatch, target: str, dtype: torch.dtype, variant: str, sums: Sums
) -> None:
    binary = compiled(monkeypatch, target, KERNEL, statistics_of, (dtype, variant, sums))
    assert_spills_nothing(binary)
    _, shared_limit = TARGETS[target]
    assert binary.shared <= shared_limit


def test_hopper_uses_its_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.bfloat16, "everything", Sums(True, True, True))
    binary = compiled(monkeypatch, "sm_90", KERNEL, statistics_of, arguments)
    assert "wgmma.mma_async" in binary.assembly
