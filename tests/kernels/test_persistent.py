"""The persistent projection, held to the tests of the other one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from against_torch import (
    DEVICE,
    FLOATS,
    INF,
    QUIET,
    Transform,
    examples,
    offsets,
    randint,
    randn,
    spread,
    transforms,
    triton,
)
from hypothesis import given
from hypothesis import strategies as st
from test_projection import check_projection

from fastpref.kernels import launch, logsumexp, logsumexp_persistent

pytestmark = QUIET
SHIPPED = launch.PERSISTENT_CONFIG


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every projection reads through descriptors: on the CPU the interpreter does."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a device that copies tiles by itself")
    if DEVICE == "cpu" and triton.__version__.startswith("3.5."):
        pytest.skip("Triton 3.5's interpreter wants 16 elements where 16 bytes do")
    found = []
    kernel = logsumexp_persistent.persistent_logsumexp

    def noting(*args):
        found.append(1)
        return kernel(*args)

    monkeypatch.setattr(logsumexp, "reads_through_descriptors", lambda *_: True)
    monkeypatch.setattr(logsumexp, "persistent_logsumexp", noting)
    if DEVICE == "cpu":  # several pieces a program, in tiles that the interpreter likes
        small = launch.ProjectionConfig(32, 64, 32, 4, 2)
        monkeypatch.setattr(logsumexp_persistent, "PERSISTENT_CONFIG", small)
    yield
    assert found, "the kernel under test never ran"


# Rows of 16 bytes and their multiples can be described.
@examples
@given(
    n=st.integers(1, 140),
    hidden_size=st.sampled_from([8, 32, 104]),
    vocab_size=st.sampled_from([1, 5, 64, 300]),
    dtype=st.sampled_from(FLOATS),
    offset=st.none() | offsets,
    has_labels=st.booleans(),
    gathers=st.booleans(),
    transform=transforms,
)
def test_it_is_as_good_as_torch(
    n: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    offset: float | None,
    has_labels: bool,
    gathers: bool,
    transform: Transform,
) -> None:
    if DEVICE == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16
    check_projection(
        randn(0, 150 if gathers else n, hidden_size, dtype=dtype),
        randn(1, vocab_size, hidden_size, dtype=dtype),
        None if offset is None else randn(2, vocab_size, dtype=dtype) + offset,
        randint(3, vocab_size, n) if has_labels else None,
        randint(4, 150, n) if gathers else None,
        transform,
    )


# 4 programs, 2 row blocks and 7 tiles: pieces of 1, of 3 (the last one has 1) and of 7 tiles.
@pytest.mark.parametrize("tiles_per_split", [1, 3, 7])
def test_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, tiles_per_split: int) -> None:
    monkeypatch.setattr(logsumexp_persistent, "even_split", lambda *_: tiles_per_split)
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    config = logsumexp_persistent.PERSISTENT_CONFIG
    n, vocab_size = 2 * config.block_rows - 5, 7 * config.block_vocab - 3
    hidden, weight = randn(0, n, 72, dtype=dtype), randn(1, vocab_size, 72, dtype=dtype)
    check_projection(hidden, weight, None, randint(2, vocab_size, n), None)


def test_more_row_blocks_than_run_together() -> None:
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    n = 17 * logsumexp_persistent.PERSISTENT_CONFIG.block_rows - 3
    hidden, weight = randn(0, n, 16, dtype=dtype), randn(1, 150, 16, dtype=dtype)
    check_projection(hidden, weight, None, randint(2, 150, n), None)


@pytest.mark.parametrize("value", [0.01, -INF])
def test_a_small_row_after_a_large_one(value: float) -> None:
    """A program that goes on to other rows forgets maximum and sum of those before."""
    block = logsumexp_persistent.PERSISTENT_CONFIG.block_rows
    hidden = torch.full((3 * block, 16), value, device=DEVICE, dtype=torch.float16)
    hidden[:block] = 100
    weight = randn(1, 700, 16, dtype=torch.float16).abs().clamp(min=0.1)
    reference, sum_exp, _ = logsumexp.projection_logsumexp(
        hidden, weight, None, None, None, Transform()
    )
    z = hidden.double() @ weight.double().T
    found = reference.double() + sum_exp.log()
    torch.testing.assert_close(found, z.logsumexp(-1), rtol=1e-5, atol=0)


def test_the_tile_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logsumexp_persistent, "PERSISTENT_CONFIG", SHIPPED)
    hidden = randn(0, 140, 72, dtype=torch.float16)
    weight, bias = randn(1, 600, 72, dtype=torch.float16), randn(2, 600, dtype=torch.float16)
    check_projection(hidden, weight, bias, randint(2, 600, 140), None)


def test_rows_that_are_far_apart() -> None:
    hidden, weight = randn(0, 3, 16, dtype=torch.float16), randn(1, 3, 16, dtype=torch.float16)
    check_projection(spread(hidden), weight, None, randint(2, 3, 3), None)
    check_projection(hidden, spread(weight), None, randint(2, 3, 3), None)


def test_labels_outside_the_vocabulary() -> None:
    labels = torch.tensor([-100, -1, 5, 7, 128, 2**32 + 1, 4], device=DEVICE)
    hidden, weight = randn(0, 7, 8, dtype=torch.float16), randn(1, 5, 8, dtype=torch.float16)
    check_projection(hidden, weight, None, labels, None)


@pytest.mark.parametrize("tiles_per_split", [1, 7])
def test_a_masked_vocabulary(monkeypatch: pytest.MonkeyPatch, tiles_per_split: int) -> None:
    """Also where a program goes on from a piece with logits to one without."""
    monkeypatch.setattr(logsumexp_persistent, "even_split", lambda *_: tiles_per_split)
    hidden, weight = randn(0, 3, 8, dtype=torch.float16), randn(1, 400, 8, dtype=torch.float16)
    labels = torch.tensor([399, 0, 390], device=DEVICE)
    for kept in (slice(390, 400), slice(0, 1), slice(0, 0)):
        bias = torch.full((400,), -INF, device=DEVICE, dtype=torch.float16)
        bias[kept] = 0.5
        for row_labels in (None, labels):
            check_projection(hidden, weight, bias, row_labels, None)
