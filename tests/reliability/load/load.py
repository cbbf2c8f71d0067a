"""Thousands of random steps in one process: memory, drift, bits and compilations.

``make load`` takes many, test_load.py a few. Every step has a seed of its own, so that one that
fails can be taken alone.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Iterable
from typing import NamedTuple

import psutil
import torch
from calls import CALLS
from every_function import TRAINED, batch, gradients, leaves_of, same_bits, total
from fresh import digest
from steps import drawn_step
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

MIB = 2**20
WARM_UP = 100  # steps at least: every function has been compiled for two lengths then
# Between the end of the warm-up and the last step; the allocator's own pages come and go.
RESIDENT_BOUND = 16 * MIB
OBJECTS_BOUND = 100
# Of each function: for the first length and for all others.
COMPILATIONS = 2
COMPILED = ("linear_logps_with_stats", "linear_divergence", "tvkd_loss")


class State(NamedTuple):
    """What must not grow."""

    graphs: int  # that torch.compile has made
    operators: int  # of fastpref, registered
    tensors: int  # alive
    objects: int  # that Python's garbage collector knows
    resident: int  # bytes

    @classmethod
    def now(cls) -> State:
        gc.collect()
        objects = gc.get_objects()
        names = torch._C._dispatch_get_all_op_names()
        return cls(
            counters["stats"]["unique_graphs"],
            sum(name.startswith("fastpref::") for name in names),
            sum(issubclass(type(one), Tensor) for one in objects),
            len(objects),
            psutil.Process().memory_info().rss,
        )

    def hold(self, before: State) -> None:
        """Refuse growth since ``before``."""
        bounds = State(0, 0, 0, OBJECTS_BOUND, RESIDENT_BOUND)
        for name, now, then, bound in zip(self._fields, self, before, bounds, strict=True):
            assert now - then <= bound, f"{name}: {then} after the warm-up, {now} at the end"

    def __str__(self) -> str:
        counts = (f"{value} {name}" for name, value in list(self._asdict().items())[:-1])
        return ", ".join([*counts, f"{self.resident / MIB:.1f} MiB"])


class Compiled:
    """Some functions under `torch.compile`, on batches of any length."""

    def __init__(self, names: Iterable[str]):
        torch._dynamo.reset()
        self.counters = {name: CompileCounterWithBackend("aot_eager") for name in names}
        self.functions = {
            name: torch.compile(_loss_of(name), backend=counter, fullgraph=True)
            for name, counter in self.counters.items()
        }

    def step(self, chance: random.Random) -> None:
        """Every function with one more length: the gradients of plain calls."""
        length = chance.randint(2, 40)
        for name, function in self.functions.items():
            found, expected = (_gradients(one, length) for one in (function, _loss_of(name)))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)

    def hold(self) -> None:
        """Refuse more compilations than two of each function."""
        for name, counter in self.counters.items():
            assert counter.frame_count <= COMPILATIONS, f"{name}: {counter.frame_count} graphs"


def _loss_of(name: str):
    def loss(given: dict[str, Tensor]) -> Tensor:
        return total(TRAINED[name](given, True))

    return loss


def _gradients(loss, length: int) -> list[Tensor]:
    given = batch()
    for name in ("hidden", "teacher", "labels"):
        one = given[name]
        given[name] = one.repeat(1, 14, *[1] * (one.dim() - 2))[:, :length].contiguous()
    for name in leaves_of(True):
        given[name].requires_grad_()
    return gradients(given, loss(given))


def load(
    steps: int,
    seed: int = 0,
    *,
    warm_up: int,
    compare_every: int,
    compile_every: int,
    names: Iterable[str] = tuple(CALLS),
    compiled: Iterable[str] = COMPILED,
    report_every: int = sys.maxsize,
) -> tuple[State, State]:
    """Take so many steps; the states after the warm-up and at the end, if nothing failed."""
    probe, of_compiler = digest(), Compiled(compiled)
    for number in range(steps):
        if number == warm_up:
            step = found = None  # as at the end
            first = State.now()
        if number % report_every == 0:
            print(f"step {number}: {State.now()}", flush=True)
        chance = random.Random(f"{seed} {number}")
        try:
            step = drawn_step(chance, names)
            found = step.ours()
            if number % compare_every == 0:
                step.hold(found)
                assert same_bits(step.ours(), found), "other bits the second time"
            if number % compile_every == 0:
                of_compiler.step(chance)
        except Exception as error:
            error.add_note(f"step {number} of seed {seed}")
            raise
    step = found = None
    last = State.now()
    last.hold(first)
    of_compiler.hold()
    assert digest() == probe, "the probe has other bits at the end"
    return first, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 2 * WARM_UP:
        parser.error(f"--steps: expected at least {2 * WARM_UP}, got {args.steps}")
    torch.set_num_threads(1)
    first, last = load(
        args.steps, args.seed, warm_up=max(args.steps // 10, WARM_UP), compare_every=10,
        compile_every=20, report_every=args.steps // 10,
    )  # fmt: skip
    print(f"after the warm-up: {first}\nat the end: {last}\nno drift, the same bits")


if __name__ == "__main__":
    main()
