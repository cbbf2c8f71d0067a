"""The benchmark of rounding errors sees wrong numbers, and the docs have the tables of its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import error_report
import errors
import pytest
import torch
from error_primitives import PRIMITIVES, Peer

RESULTS = Path(errors.__file__).with_name("results")
DOCS = RESULTS.parents[1] / "docs"
ALONE = [replace(one, peers={}) for one in PRIMITIVES]  # importing the peers takes seconds


@pytest.fixture(scope="module")
def inputs():
    return errors.random_inputs(3, tokens=40, hidden_size=8, vocabulary=70)


def measured(primitive, inputs, by=errors.FASTPREF):
    return [row for row in errors.measure(primitive, "", "float32", inputs) if row.by == by]


@pytest.mark.parametrize("primitive", ALONE, ids=lambda one: one.name)
def test_every_function_is_compared_with_its_own_formula(primitive, inputs):
    ours, full = (measured(primitive, inputs, by) for by in (errors.FASTPREF, errors.FULL))
    assert len(ours) == len(full) > 0
    for row, plain in zip(ours, full, strict=True):
        for error in error_report.ERRORS:
            found, expected = getattr(row, error), getattr(plain, error)
            assert (found is None) == (expected is None)
            # A cached KL is a difference of large numbers, and few tokens have lucky errors.
            assert found is None or found <= 10 * expected + 1e-6
    gradients = (ours[0].hidden is not None, ours[0].head is not None)
    assert (
        gradients
        == {"none": (False, False), "hidden": (True, False), "both": (True, True)}[
            primitive.gradients
        ]
    )


def test_one_wrong_token_shows(inputs):
    def wrong(given):
        values = ALONE[0].fastpref(given)
        factors = torch.ones_like(values)
        factors[values.detach().argmin()] = 1.001
        return values * factors

    (right,), (row,) = (
        measured(one, inputs) for one in (ALONE[0], replace(ALONE[0], fastpref=wrong))
    )
    for error in error_report.ERRORS:
        assert getattr(row, error) > 1e-5 > 10 * getattr(right, error)


@pytest.mark.parametrize("trained", [False, True])
def test_a_wrong_gradient_of_one_kind_of_head_shows(inputs, trained):
    def wrong(given):
        values = ALONE[0].fastpref(given)
        if given.student.weight.requires_grad != trained:
            return values
        return values + 1e-3 * (values - values.detach())

    (row,) = measured(replace(ALONE[0], fastpref=wrong), inputs)
    assert row.value < 1e-6
    assert row.hidden == pytest.approx(1e-3, rel=1e-2)
    assert row.head == pytest.approx(1e-3, rel=1e-2) if trained else row.head < 1e-6


def test_what_does_not_run_is_a_row_that_says_why(inputs):
    def missing(_):
        raise ImportError("No module named 'peer' (from /somewhere)")

    def failing(_):
        raise RuntimeError("no such kernel\nmore")

    peers = {
        "missing": Peer(missing, "pip install peer"),
        "failed": Peer(failing),
        "needs a GPU": Peer(failing, needs_cuda=True),
    }
    rows = errors.measure(replace(ALONE[0], peers=peers), "here", "float32", inputs)
    found = {row.by: row for row in rows if row.by in peers}
    assert {row.status for row in found.values()} == set(peers)
    assert found["missing"].reason == "No module named 'peer'; pip install peer brings it"
    assert found["failed"].reason == "RuntimeError: no such kernel"
    assert all((row.inputs, row.dtype) == ("here", "float32") for row in rows)


def test_a_mean_has_gradients_and_no_values(inputs):
    peers = {"mean": Peer(lambda given: ALONE[0].formula(given).mean())}
    (row,) = measured(replace(ALONE[0], peers=peers), inputs, by="mean")
    assert row.value is None and row.hidden < 1e-5 and row.head < 1e-5


def test_larger_errors_are_named():
    def row(by, value, hidden=None):
        where = {"dtype": "float32", "inputs": "std 1", "primitive": "logsumexp"}
        return {**where, "by": by, "value": value, "hidden": hidden, "head": None}

    bound = row(errors.ROUNDED, 0.1, 0.1)
    ours, others = row(errors.FASTPREF, 1.0, 3.0), [row("a", 0.96), row("b", 4.0, 2.0)]
    (found,) = error_report.larger_errors([bound, ours, *others])
    assert (found.error, found.ours, found.smallest, found.by) == ("hidden", 3.0, 2.0, "b")
    (found,) = error_report.larger_errors([row(errors.FASTPREF, float("nan")), *others])
    assert found.error == "value"


def test_the_tables_are_those_of_the_results():
    path = RESULTS / "errors-cpu.json"
    rows = json.loads(path.read_text("utf-8"))["rows"]
    docs = (DOCS / "rounding_errors.md").read_text("utf-8")
    for table in error_report.tables_of_docs(rows):
        assert table in docs
    assert path.with_suffix(".md").read_text("utf-8") == error_report.markdown(path)
