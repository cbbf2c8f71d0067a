"""What each path costs, counted and not timed: matrix products and the peak of allocations."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from counting import flops_of, peak_bytes_of

import fastpref
from fastpref.ops import tiling
from fastpref.ops.linear_stats import FORMULAS

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the profiler does not see Triton's products"
)

ROWS, WIDTH, VOCAB = 256, 16, 6000
PASS = 2 * ROWS * WIDTH * VOCAB


def train_step(
    rows: int = ROWS,
    *,
    trained: bool,
    scratch_bytes: int | None = 0,
    ignored: int = 0,
    stats: bool = False,
) -> Callable[[], None]:
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=trained)
    labels = torch.randint(0, VOCAB, (rows,))
    labels[:ignored] = -100

    def run() -> None:
        if stats:
            found = fastpref.linear_logps_with_stats(
                hidden, weight, labels, scratch_bytes=scratch_bytes
            )
            found.logps.sum().backward()
        else:
            logps = fastpref.linear_logps(hidden, weight, labels, scratch_bytes=scratch_bytes)
            logps.sum().backward()

    return run


def test_a_frozen_head_takes_two_matrix_products():
    assert flops_of(train_step(trained=False)) == 2 * PASS


def test_a_trained_head_takes_four_and_three_where_exponentials_fit():
    assert flops_of(train_step(trained=True)) == 4 * PASS
    assert flops_of(train_step(trained=True, scratch_bytes=5 * ROWS * VOCAB)) == 3 * PASS
    assert flops_of(train_step(trained=True, scratch_bytes=None)) == 3 * PASS


def test_no_gradient_takes_one():
    hidden, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    labels = torch.randint(0, VOCAB, (ROWS,))
    with torch.no_grad():
        assert flops_of(lambda: fastpref.linear_logps(hidden, weight, labels)) == PASS
        assert flops_of(lambda: fastpref.linear_logsumexp(hidden, weight)) == PASS
        assert flops_of(lambda: fastpref.linear_logps_with_stats(hidden, weight, labels)) == PASS
        stats = list(FORMULAS)
        assert flops_of(lambda: fastpref.linear_stats(hidden, weight, labels, stats=stats)) == PASS
        labels[: ROWS // 2] = -100
        assert flops_of(lambda: fastpref.linear_stats(hidden, weight, labels, stats=stats)) == (
            PASS / 2
        )


def test_statistics_never_hold_the_logits(monkeypatch):
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", 2**19)

    def peak(rows: int) -> int:
        hidden, weight = torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH)
        labels = torch.randint(0, VOCAB, (rows,))
        return peak_bytes_of(
            lambda: fastpref.linear_stats(hidden, weight, labels, stats=list(FORMULAS))
        )

    small, large = peak(ROWS), peak(4 * ROWS)
    assert large < 4 * (4 * ROWS) * VOCAB / 10  # two tiles: logits, and their exponentials
    # What grows are the five numbers of a row, a few times over, and the nine answers.
    assert large - small < 3 * ROWS * 4 * 50


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        (2, {"trained": False}),
        (4, {"trained": True}),
        (3, {"trained": True, "scratch_bytes": 5 * ROWS * VOCAB}),
    ],
)
def test_stats_take_no_product_more_and_one_tile(passes, options, monkeypatch):
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", 2**19)
    with_stats = train_step(stats=True, **options)
    assert flops_of(with_stats) == passes * PASS
    more = peak_bytes_of(with_stats) - peak_bytes_of(train_step(**options))
    assert more <= 2**19 + 4 * ROWS * (128 + 40)  # of each row 128 logits and a few numbers


def test_a_gradient_of_the_logsumexp_takes_no_product_more():
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight, labels = torch.randn(VOCAB, WIDTH), torch.randint(0, VOCAB, (ROWS,))

    def run(*, uses_lse: bool) -> None:
        logps, lse, *_ = fastpref.linear_logps_with_stats(hidden, weight, labels)
        (logps.sum() + lse.sum() if uses_lse else logps.sum()).backward()

    assert flops_of(lambda: run(uses_lse=False)) == 2 * PASS
    assert flops_of(lambda: run(uses_lse=True)) == 2 * PASS


def test_ignored_rows_cost_nothing():
    assert flops_of(train_step(trained=False, ignored=ROWS // 2)) == PASS


@pytest.mark.parametrize("ignored", [0, 8])
@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_far_below_the_logits_and_flat(trained, ignored, monkeypatch):
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", 2**19)

    def beyond_gradients(rows: int) -> int:
        gradients = 4 * WIDTH * (rows + (VOCAB if trained else 0))
        return peak_bytes_of(train_step(rows, trained=trained, ignored=ignored)) - gradients

    small, large = beyond_gradients(ROWS), beyond_gradients(4 * ROWS)
    assert large < 4 * (4 * ROWS) * VOCAB / 20
    # What grows are a few numbers a row and a few copies of the hidden states.
    assert large - small < 3 * ROWS * 4 * (4 * WIDTH + 16)


def test_the_cache_stays_within_its_budget(monkeypatch):
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", 2**19)
    budget = 2**20
    numbers = 4 * ROWS  # one a row, for the rescaling of what is kept
    without = peak_bytes_of(train_step(trained=True))
    assert (
        peak_bytes_of(train_step(trained=True, scratch_bytes=budget)) <= without + budget + numbers
    )


def test_the_cache_is_no_larger_than_what_there_is_to_keep():
    exponentials = 4 * ROWS * VOCAB
    without = peak_bytes_of(train_step(trained=True, scratch_bytes=0))
    for scratch_bytes in (2**30, None):
        found = peak_bytes_of(train_step(trained=True, scratch_bytes=scratch_bytes))
        assert exponentials < found <= without + 1.01 * exponentials  # a few numbers a row and tile


def test_nothing_is_kept_where_no_head_trains():
    frozen = peak_bytes_of(train_step(trained=False, scratch_bytes=2**20))
    assert frozen == peak_bytes_of(train_step(trained=False))

    def without_gradient(scratch_bytes: int) -> int:
        hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH, requires_grad=True)
        labels = torch.randint(0, VOCAB, (ROWS,))
        with torch.no_grad():
            return peak_bytes_of(
                lambda: fastpref.linear_logps(hidden, weight, labels, scratch_bytes=scratch_bytes)
            )

    assert without_gradient(2**20) == without_gradient(0)
