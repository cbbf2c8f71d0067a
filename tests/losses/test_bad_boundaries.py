"""Boundaries of packed sequences that cannot be are refused, or NaN where nobody reads them."""

from __future__ import annotations

import pytest
import torch
from bad_input import LOSSES, OF_PAIRS, WRONG_OR_RIGHT, arguments, refused
from torch import Tensor

import fastpref


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize(
    "boundaries",
    [[1, 4, 8, 12, 16], [0, 4, 8, 12, 15], [0, 4, 8, 12, 17], [0, 8, 4, 12, 16], [0, -4, 4, 8, 16]],
    ids=["late start", "early end", "late end", "falling", "negative"],
)
def test_wrong_boundaries(name, boundaries):
    refused(
        name, "cu_seqlens", "never fall, from 0 to 16", str(boundaries),
        packed=True, cu_seqlens=torch.tensor(boundaries),
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_boundaries_are_nan_where_nobody_reads_them(name):
    for boundaries in WRONG_OR_RIGHT:
        given = arguments(name, packed=True) | {"cu_seqlens": torch.tensor(boundaries)}
        found = getattr(fastpref, name)(**given, compact=False)
        numbers = torch.cat((found.loss[None], found.chosen_logps, found.rejected_logps))
        assert (torch.isnan(numbers) == (boundaries != [0, 4, 8, 12, 16])).all()


@pytest.mark.parametrize("potential", ["value", "margin"])
def test_wrong_boundaries_are_nan_shaping_where_nobody_reads_them(potential):
    for boundaries in WRONG_OR_RIGHT:
        given = arguments("teacher_shaping", packed=True) | {"cu_seqlens": torch.tensor(boundaries)}
        found = fastpref.teacher_shaping(**given, compact=False, potential=potential)
        assert (torch.isnan(found) == (boundaries != [0, 4, 8, 12, 16])).all()


def test_compiled_code_checks_boundaries_too():
    given = arguments("tvkd_loss", packed=True)

    def loss(cu_seqlens: Tensor) -> Tensor:
        return fastpref.tvkd_loss(**{**given, "cu_seqlens": cu_seqlens}).loss

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(given["cu_seqlens"]), loss(given["cu_seqlens"]))
    with pytest.raises(ValueError, match="cu_seqlens: expected boundaries that never fall"):
        compiled(torch.tensor([0, 8, 4, 12, 16]))


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("boundaries", [[0, 4, 8, 16], [0], [0, 16], [[0, 8, 16]], []], ids=str)
def test_boundaries_that_make_no_pairs(name, boundaries):
    boundaries = torch.tensor(boundaries, dtype=torch.int64)
    refused(
        name, "cu_seqlens", "(2B + 1,)", str(tuple(boundaries.shape)),
        packed=True, cu_seqlens=boundaries,
    )  # fmt: skip


@pytest.mark.parametrize("name", OF_PAIRS)
def test_boundaries_of_another_kind(name):
    boundaries = torch.arange(5) * 4
    refused(name, "cu_seqlens", "integer", "torch.float32", packed=True, cu_seqlens=boundaries / 1)
    refused(name, "cu_seqlens", "a tensor", "list", packed=True, cu_seqlens=boundaries.tolist())


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_token_at_the_end_of_a_packed_sequence(name):
    for position in (3, 15):
        labels = arguments(name, packed=True)["labels"]
        labels[position] = 1
        refused(
            name, "labels", "-100 (ignore_index) at the last position", "a token there",
            packed=True, labels=labels,
        )  # fmt: skip


def test_sums_over_wrong_boundaries_are_nan_where_nobody_reads_them():
    for boundaries in WRONG_OR_RIGHT:
        labels = arguments("tvkd_loss", packed=True)["labels"]
        given = {"cu_seqlens": torch.tensor(boundaries), "compact": False}
        found = fastpref.sum_responses(torch.zeros(16), labels, **given)
        assert (found.logps.isnan() == (boundaries != [0, 4, 8, 12, 16])).all()
