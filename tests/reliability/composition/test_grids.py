"""The tiles of accelerators, several to a matrix product, give the numbers of a CPU's."""

from __future__ import annotations

import pytest
import torch
from every_function import HEADED, WITH_GRADIENT, batch, flat, gradients, head, leaves_of, total

import fastpref
from fastpref.ops import tiling
from fastpref.ops.tiling import Tiling


def numbers() -> list[torch.Tensor]:
    """What all functions return in float64, and their gradients."""
    given = batch(dtype=torch.float64)
    found = flat([function(given, True) for function in HEADED.values()])
    for name, trained in WITH_GRADIENT:
        given = batch(trains=leaves_of(trained), dtype=torch.float64)
        found += gradients(given, total(HEADED[name](given, True)))
    for scratch_bytes in (0, 1200, 10**6):  # no tile is kept, some are, or all
        for trained in (True, False):
            given = batch(trains=leaves_of(trained), dtype=torch.float64)
            hidden, labels = given["hidden"], given["labels"]
            logps = fastpref.linear_logps(hidden, head(given), labels, scratch_bytes=scratch_bytes)
            found += [logps.detach(), *gradients(given, total(logps))]
    return found


@pytest.mark.parametrize(
    ("row_step", "column_step", "tiles_across", "stretch_rows", "tail"),
    [(4, 5, 1, 4, 0), (3, 4, 3, 6, 4), (2, 8, 2, 8, 3), (4, 6, 3, 12, 2), (1, 1, 1, 1, 0)],
)
def test_grids(row_step, column_step, tiles_across, stretch_rows, tail, monkeypatch):
    expected = numbers()

    def grid(rows: int, vocab_size: int, _: torch.Tensor) -> Tiling:
        return Tiling(rows, vocab_size, row_step, column_step, tiles_across, stretch_rows, tail)

    monkeypatch.setattr(tiling, "_cpu_grid", grid)
    for one, other in zip(numbers(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
