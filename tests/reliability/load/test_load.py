"""A few hundred steps of `load`, and that it sees what it is there to see."""

from __future__ import annotations

import re

import calls
import every_function
import pytest
import torch
from load import load

FEW = {"warm_up": 5, "compare_every": 1, "compile_every": 4, "compiled": ()}


def test_every_function_is_called():
    """`sum_responses` where losses are, of which every method has its turn."""
    assert {*calls.CALLS, "sum_responses"} == {*every_function.EVERY, "losses"}


def test_a_few_hundred_steps():
    load(180, warm_up=60, compare_every=10, compile_every=50, compiled=["linear_divergence"])


def test_kept_results_are_seen(monkeypatch):
    function, kept = calls.CALLS["sequence_rewards"], []

    def leaking(problem, given):
        kept.append(function.ours(problem, given))
        return kept[-1]

    monkeypatch.setitem(calls.CALLS, "sequence_rewards", function._replace(ours=leaking))
    with pytest.raises(AssertionError, match=r"tensors: \d+ after the warm-up, \d+ at the end"):
        load(9, names=["sequence_rewards"], **FEW)


def test_drift_is_seen_and_its_step_said(monkeypatch):
    function, count = calls.CALLS["linear_logps"], iter(range(1000))

    def drifting(problem, given):
        return function.ours(problem, given) * (1 + 1e-3 * (next(count) >= 14))

    monkeypatch.setitem(calls.CALLS, "linear_logps", function._replace(ours=drifting))
    with pytest.raises(AssertionError) as caught:
        load(9, names=["linear_logps"], **FEW)
    assert re.fullmatch("step [789] of seed 0", caught.value.__notes__[0])


def test_other_bits_are_seen(monkeypatch):
    function = calls.CALLS["linear_logps"]

    def noisy(problem, given):
        return function.ours(problem, given) + 1e-30 * torch.rand(())

    monkeypatch.setitem(calls.CALLS, "linear_logps", function._replace(ours=noisy))
    with pytest.raises(AssertionError, match="other bits the second time"):
        load(9, names=["linear_logps"], **FEW)


def test_compilations_are_seen(monkeypatch):
    """Of a function whose options are other ones on every call."""
    function, option = every_function.TRAINED["linear_logps"], ["a"]

    def specialised(given, compact):
        found = function(given, compact) * len(option[0])
        if not torch.compiler.is_compiling():  # the plain call, which comes second
            option[0] += "a"
        return found

    monkeypatch.setitem(every_function.TRAINED, "linear_logps", specialised)
    few = FEW | {"compiled": ["linear_logps"]}
    with pytest.raises(AssertionError, match=r"graphs: \d+ after the warm-up, \d+ at the end"):
        load(9, names=["sequence_rewards"], **few)
