"""The kernels under `linear_divergence`, compiled for every target: they fit and spill nothing."""

from __future__ import annotations

import pytest
import torch
from test_compiled import FLOATS, TARGETS, Transform, assert_spills_nothing, compiled

from fastpref.kernels import divergences

N = 16
WRITTEN = ("forward_kl", "jsd")  # written as it is read, and read once more to be written


def compare(
    kind: str, detached: bool, dtype: torch.dtype | None, everything: bool, width: int
) -> None:
    """One launch, without gradients for no ``dtype``.

    Everything is soft caps and what log-probabilities and statistics are made of.
    """
    transform = Transform(softcap=30.0 if everything else None)
    places = () if dtype is None else (torch.empty(N, width, dtype=dtype) for _ in range(2))
    divergences.compare_rows(
        torch.empty(N, width),
        torch.empty(N, width),
        torch.zeros(N, dtype=torch.int64),
        transform,
        None if kind == "advantage" else transform,
        kind,
        0.3,
        detached,
        None,
        None,
        torch.empty(N),
        [torch.empty(N) for _ in range(4)] if everything else (),
        *list(places)[: 1 + everything],
    )


def log_ratio(softcap: float | None, width: int) -> None:
    transform = Transform(softcap=softcap)
    rows = (torch.empty(N, width) for _ in range(2))
    divergences.log_ratio_rows(*rows, transform, transform, torch.empty(N))


COMPARE = (divergences, "_compare_rows_kernel")
LOG_RATIO = (divergences, "_log_ratio_rows_kernel")
CASES = [
    *((COMPARE, compare, (kind, False, torch.bfloat16, True, 50257)) for kind in divergences.KINDS),
    *((COMPARE, compare, (kind, False, torch.bfloat16, False, 8192)) for kind in WRITTEN),
    (COMPARE, compare, ("skew_reverse_kl", True, torch.bfloat16, True, 50257)),
    # A vocabulary of whole blocks, and one of part of a block.
    *((COMPARE, compare, ("jsd", False, dtype, True, 8192)) for dtype in FLOATS),
    (COMPARE, compare, ("jsd", False, torch.bfloat16, True, 7)),
    (COMPARE, compare, ("jsd", False, None, True, 50257)),
    (LOG_RATIO, log_ratio, (None, 8192)),
    (LOG_RATIO, log_ratio, (30.0, 50257)),
]


# Elementwise code differs little between devices of one maker: two of its kernels are enough there.
LARGEST = (CASES[-1], (COMPARE, compare, ("jsd", False, torch.bfloat16, True, 50257)))
ONE_OF_A_MAKER = ("sm_90", "gfx942")


@pytest.mark.parametrize(
    ("target", "kernel", "call", "arguments"),
    [
        (target, *case)
        for target in TARGETS
        for case in (CASES if target in ONE_OF_A_MAKER else LARGEST)
    ],
)
def test_fits_and_spills_nothing(
    monkeypatch: pytest.MonkeyPatch, target: str, kernel: tuple, call: object, arguments: tuple
) -> None:
    binary = compiled(monkeypatch, target, kernel, call, arguments)
    assert_spills_nothing(binary)
    _, shared_limit = TARGETS[target]
    assert binary.shared <= shared_limit
