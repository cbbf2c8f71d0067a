"""The same inputs give the same bits; what the environment may change is a rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import formulas
import pytest
import torch
from closeness import assert_no_worse
from every_function import WAYS, run, same_bits
from fresh import digest
from torch import Tensor

import fastpref
from fastpref import Head
from fastpref.ops import tiling

ROOT = Path(fastpref.__file__).resolve().parents[1]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_same_bits_again():
    first = [run(*way) for way in WAYS]
    for way, expected in zip(reversed(WAYS), reversed(first), strict=True):
        assert same_bits(run(*way), expected), way


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_same_bits_in_a_fresh_process_in_forked_ones_and_in_a_loaders_workers():
    """All of them call after their parent has."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fresh.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    with threads(1):
        assert found.stdout.split() == [digest()] * 5, found.stderr


ROWS, WIDTH, VOCAB = 24, 16, 900


def operands(dtype: torch.dtype) -> dict[str, Tensor]:
    """More rows and tokens than one tile has of either, once tiles are small."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).bfloat16().to(dtype)

    found = {"hidden": normal(ROWS, WIDTH), "weight": normal(VOCAB, WIDTH)}
    found |= {"teacher": normal(ROWS, 12), "of_teacher": normal(VOCAB, 12)}
    labels = torch.randint(VOCAB, (ROWS,), generator=random)
    labels[2::5] = -100
    return {**found, "labels": labels}


def results(
    given: dict[str, Tensor], logps: Callable[..., Tensor], divergence: Callable[..., Tensor]
) -> list[Tensor]:
    """Values and gradients of the hidden states, (n, ...) each."""
    hidden = given["hidden"].clone().requires_grad_()
    student, teacher = (
        (hidden, Head(given["weight"])),
        (given["teacher"], Head(given["of_teacher"])),
    )
    values = [logps(*student, given["labels"]), divergence(student, teacher, given["labels"])]
    return [*values, *(torch.autograd.grad(one.sum(), hidden)[0] for one in values)]


def ours(given: dict[str, Tensor], **options: bool) -> list[Tensor]:
    return results(
        given,
        partial(fastpref.linear_logps, **options),
        lambda student, teacher, labels: fastpref.linear_divergence(
            *student, *teacher, labels, kind="jsd", **options
        ),
    )


def mates(given: dict[str, Tensor], rows: slice) -> list[Tensor]:
    """Of some rows without the others."""
    of_rows = {name: given[name][rows] for name in ("hidden", "teacher", "labels")}
    return ours({**given, **of_rows})


@contextmanager
def small_tiles(monkeypatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        for name in ("CPU_TILE_BYTES", "CPU_BLOCK_BYTES", "CPU_PIECE_BYTES"):
            patched.setattr(tiling, name, 2**12)
        patched.setattr(tiling, "ROWS_PER_TILE", 7)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_elsewhere_and_other_threads_and_tiles_change_roundings_only(dtype, monkeypatch):
    given = operands(dtype)
    formula = formulas.linear_logps, partial(formulas.linear_divergence, kind="jsd")
    exact, plain = (results(operands(one), *formula) for one in (torch.float64, dtype))
    found = {"again": ours(given), "every row": ours(given, compact=False)}
    alone = [mates(given, slice(row, row + 1)) for row in range(ROWS)]
    halves = [mates(given, slice(0, 9)), mates(given, slice(9, ROWS))]
    for name, parts in {"alone": alone, "halves": halves}.items():
        found[name] = [torch.cat(one) for one in zip(*parts, strict=True)]
    for count in (1, 2, 3):
        with threads(count):
            found[f"{count} threads"] = ours(given)
    with small_tiles(monkeypatch):
        found["small tiles"] = ours(given)
    for ways in found.values():
        for one, rough, right in zip(ways, plain, exact, strict=True):
            assert_no_worse(one.detach(), rough.detach(), right.detach(), dtype)
