"""What divergences cost, counted and not timed: matrix products and the peak of allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import flops_of, peak_bytes_of
from two_heads import EVERY, OPTIONS

from fastpref.ops import linear_divergence, linear_divergence_with_stats, tiling

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = 64, 8, 24, 3000
S = 2 * ROWS * WIDTH * VOCAB
T = 2 * ROWS * TEACHER_WIDTH * VOCAB


def step(
    name: str = "forward_kl",
    rows: int = ROWS,
    *,
    trained: bool = False,
    scratch_bytes: int | None = 0,
    ignored: int = 0,
    reads: tuple[str, ...] | None = None,  # of the fields that stats give
) -> Callable[[], None]:
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=trained)
    teacher = torch.randn(rows, TEACHER_WIDTH), torch.randn(VOCAB, TEACHER_WIDTH)
    labels = torch.randint(0, VOCAB, (rows,))
    labels[:ignored] = -100
    options: dict[str, Any] = {"kind": name.partition(",")[0], **OPTIONS[name]}
    if options["kind"] == "advantage":
        options |= {"reference_hidden": teacher[0] * 2, "reference_head": teacher[1]}

    def run() -> None:
        function = linear_divergence if reads is None else linear_divergence_with_stats
        found = function(hidden, weight, *teacher, labels, scratch_bytes=scratch_bytes, **options)
        values = [found] if reads is None else [getattr(found, field) for field in reads]
        sum(one.sum() for one in values).backward()

    return run


@pytest.mark.parametrize("name", EVERY)
def test_products(name):
    """Every kind takes the same: one reading of each teacher where anything may be kept."""
    teachers = 2 * T if name.startswith("advantage") else T
    assert flops_of(step(name)) == teachers + 2 * S
    assert flops_of(step(name, trained=True, scratch_bytes=None)) == teachers + 3 * S
    assert flops_of(step(name, trained=True)) == 2 * teachers + 4 * S


@pytest.mark.parametrize("name", EVERY)
def test_no_gradient_takes_one_product_of_each(name):
    teachers = 2 * T if name.startswith("advantage") else T
    run = step(name)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        run()  # as far as backward
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH)
    teacher = torch.randn(ROWS, TEACHER_WIDTH), torch.randn(VOCAB, TEACHER_WIDTH)
    options = {"kind": name.partition(",")[0], **OPTIONS[name]}
    if options["kind"] == "advantage":
        options |= {"reference_hidden": teacher[0], "reference_head": teacher[1]}
    labels = torch.randint(0, VOCAB, (ROWS,))
    for function in (linear_divergence, linear_divergence_with_stats):
        found = flops_of(lambda: function(hidden, weight, *teacher, labels, **options))  # noqa: B023  # called before the loop goes on
        assert found == teachers + S


def test_half_of_the_rows_kept_are_half_of_the_rows_not_read_again():
    half = 4 * VOCAB * ROWS // 2
    assert flops_of(step(trained=True, scratch_bytes=half)) == 1.5 * T + 3.5 * S


@pytest.mark.parametrize(
    ("reads", "products"),
    [(("divergence",), 3), (("logps",), 3), (("divergence", "logps", "lse"), 3)],
)
def test_stats_take_one_product_more_where_the_head_is_frozen(reads, products):
    assert flops_of(step(reads=reads)) == T + products * S


@pytest.mark.parametrize("reads", [("divergence",), ("divergence", "logps", "lse")])
def test_stats_take_no_product_more_where_the_head_trains(reads):
    assert flops_of(step(trained=True, scratch_bytes=None, reads=reads)) == T + 3 * S
    assert flops_of(step(trained=True, reads=reads)) == 2 * T + 4 * S


def test_ignored_rows_cost_nothing():
    assert flops_of(step(ignored=ROWS // 2)) == (T + 2 * S) / 2


@pytest.mark.parametrize(
    ("name", "trained", "ignored"),
    [("jsd", False, 0), ("jsd", True, 16), ("advantage", True, 0), ("advantage", False, 16)],
)
def test_memory_is_two_blocks_and_flat(name, trained, ignored, monkeypatch):
    block, piece, tile = 2 * 16 * 4 * VOCAB, 4 * 4 * VOCAB, 2**17
    monkeypatch.setattr(tiling, "CPU_BLOCK_BYTES", block)  # of two heads and 16 rows
    monkeypatch.setattr(tiling, "CPU_PIECE_BYTES", piece)
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", tile)

    def beyond_gradients(rows: int) -> int:
        gradients = 4 * WIDTH * (rows + (2 * VOCAB if trained else 0))
        run = step(name, rows, trained=trained, ignored=ignored)
        return peak_bytes_of(run) - gradients

    small, large = beyond_gradients(ROWS), beyond_gradients(2 * ROWS)
    growth = large - small
    # Four pieces, and a few numbers a token beside.
    assert large < block + 5 * piece + (tile if trained else 0) + growth
    # What grows are a few numbers a row and a few copies of the hidden states.
    assert growth < ROWS * 4 * (6 * WIDTH + TEACHER_WIDTH + 32)


def test_a_block_is_a_quarter_of_a_small_batch(monkeypatch):
    monkeypatch.setattr(tiling, "CPU_PIECE_BYTES", 4 * 4 * VOCAB)
    rows = 4 * tiling.CPU_FEWEST_ROWS
    logits = 2 * rows * 4 * VOCAB
    assert peak_bytes_of(step(rows=rows)) < 1.1 * logits / 4 + 5 * tiling.CPU_PIECE_BYTES


def test_the_cache_stays_within_its_budget(monkeypatch):
    monkeypatch.setattr(tiling, "CPU_BLOCK_BYTES", 2 * 16 * 4 * VOCAB)
    budget = 10 * 4 * VOCAB
    without = peak_bytes_of(step(trained=True))
    assert peak_bytes_of(step(trained=True, scratch_bytes=budget)) <= without + budget


@pytest.mark.parametrize("reads", [None, ("divergence", "logps")])
def test_the_cache_is_no_larger_than_what_there_is_to_keep(reads):
    gradients = 4 * ROWS * VOCAB * (1 if reads is None else 2)
    without = peak_bytes_of(step(trained=True, scratch_bytes=0, reads=reads))
    for scratch_bytes in (2**30, None):
        found = peak_bytes_of(step(trained=True, scratch_bytes=scratch_bytes, reads=reads))
        assert found <= without + 1.01 * gradients
