"""Any functions with any options in any order: nothing that came before changes what comes out."""

from __future__ import annotations

import random
import weakref

import calls
import pytest
import torch
from every_function import same_bits
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from problems import Given
from steps import DTYPES, Step, drawn_step
from torch import Tensor

NAMES, SEEDS = st.sampled_from(list(calls.CALLS)), st.integers(0, 2**31)
BUDGET = settings(max_examples=25, stateful_step_count=12, derandomize=True, deadline=None)


class Begun:
    """A call of which the backward pass is yet to come."""

    def __init__(self, step: Step, given: Given, found: list[Tensor]):
        self.step, self.given, self.found = step, given, found


class Machine(RuleBasedStateMachine):
    """One batch and one head at a time, and calls that are still waiting for their gradients."""

    @initialize(seed=SEEDS)
    def begin(self, seed: int) -> None:
        self.begun: list[Begun] = []
        self.gone: list[weakref.ref[Tensor]] = []
        self.given: Given = {}
        self.seed(seed)

    def change(self, step: Step) -> None:
        """Fresh leaves; nobody has the old ones but calls that have begun."""
        names = ("states", "weight")
        if not any(one.given is self.given for one in self.begun):
            self.gone += [weakref.ref(self.given[name]) for name in names if name in self.given]
        self.step = step
        self.given = step.leaves(step.dtype)
        self.copies = {name: one.detach().clone() for name, one in self.given.items()}

    def change_problem(self, **changes: object) -> None:
        self.change(self.step._replace(problem=self.step.problem._replace(**changes)))

    def change_batch(self, **changes: object) -> None:
        self.change_problem(batch=self.step.problem.batch._replace(**changes))

    @rule(seed=SEEDS)
    def seed(self, seed: int) -> None:
        """Another batch, another head and other options."""
        self.change(drawn_step(random.Random(seed)))

    @rule(dtype=st.sampled_from(sorted(set(DTYPES), key=str)), trained=st.booleans())
    def dtype(self, dtype: torch.dtype, trained: bool) -> None:
        self.change(self.step._replace(dtype=dtype, trained=trained, autocast=False))

    @rule(gradient=st.booleans(), autocast=st.booleans())
    def mode(self, gradient: bool, autocast: bool) -> None:
        autocast = autocast and self.step.dtype != torch.float16
        self.step = self.step._replace(gradient=gradient, autocast=autocast)

    @rule(
        temperature=st.sampled_from([0.5, 1.0, 2.3]),
        softcap=st.sampled_from([None, 3.0, 30.0]),
        biased=st.booleans(),
    )
    def head(self, temperature: float, softcap: float | None, biased: bool) -> None:
        batch = self.step.problem.batch
        bias = batch.normal(len(batch.weight)) if biased else None
        transform = batch.transform | {"softcap": softcap}
        self.change_batch(temperature=temperature, transform=transform, bias=bias)

    @rule(
        compact=st.booleans(), packed=st.booleans(), scratch_bytes=st.sampled_from([None, 0, 4000])
    )
    def options(self, compact: bool, packed: bool, scratch_bytes: int | None) -> None:
        self.change_problem(compact=compact, packed=packed, scratch_bytes=scratch_bytes)

    @rule(name=NAMES)
    def call(self, name: str) -> None:
        """Equal to full logits, and the same bits again."""
        step = self.named(name)
        found = step.ours(self.given)
        step.hold(found)
        assert same_bits(step.ours(self.given), found), "other bits the second time"

    @rule(name=NAMES)
    def begin_a_call(self, name: str) -> None:
        step = self.named(name)
        self.begun.append(Begun(step, self.given, step.call(calls.CALLS[name].ours, self.given)))

    @precondition(lambda self: self.begun)
    @rule(backward=st.booleans(), last=st.booleans())
    def end_a_call(self, backward: bool, last: bool) -> None:
        """What happened in between changes no bit of it; nor does anything stay of it."""
        one = self.begun.pop(-1 if last else 0)
        if backward:
            found = one.step.finish(one.given, one.found)
            assert same_bits(found, one.step.ours()), "other bits than a call of its own"
        self.gone += [weakref.ref(tensor) for tensor in one.found]
        held = [self.given, *(other.given for other in self.begun)]
        if not any(one.given is given for given in held):
            self.gone += [weakref.ref(one.given[name]) for name in ("states", "weight")]

    def named(self, name: str) -> Step:
        gradient = self.step.gradient and name not in calls.VALUES
        return self.step._replace(name=name, gradient=gradient)

    @invariant()
    def inputs_are_what_they_were(self) -> None:
        for name, one in self.given.items():
            assert torch.equal(one, self.copies[name]) and one._version == 0, name
            assert one.grad is None, name

    @invariant()
    def nothing_stays(self) -> None:
        assert not any(one() is not None for one in self.gone), "a tensor outlives its call"
        self.gone.clear()


TestMachine = Machine.TestCase
TestMachine.settings = BUDGET


def keeps(function):
    kept = []

    def call(problem, given):
        kept.append(function(problem, given))
        return kept[-1]

    return call


def writes(function):
    def call(problem, given):
        given["states"].detach().mul_(1)
        return function(problem, given)

    return call


def remembers(function):
    count = iter(range(10**6))

    def call(problem, given):
        return function(problem, given) * (1 + 1e-12 * next(count))

    return call


@pytest.mark.parametrize(
    ("fault", "message"),
    [(keeps, "outlives its call"), (writes, "states"), (remembers, "other bits")],
)
def test_faults_are_seen(monkeypatch, fault, message):
    function = calls.CALLS["sequence_rewards"]
    for name in calls.CALLS:  # a function that is quick, whichever is called
        monkeypatch.setitem(calls.CALLS, name, function._replace(ours=fault(function.ours)))
    once = settings(BUDGET, phases=[Phase.generate], print_blob=False)
    with pytest.raises(AssertionError, match=message):
        run_state_machine_as_test(Machine, settings=once)
