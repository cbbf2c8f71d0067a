"""What PyTorch may put around a loss: it changes no bit, or what it is there to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import pytest
import torch
from every_function import (
    EVERY,
    HEADED,
    WAYS,
    WITH_GRADIENT,
    batch,
    flat,
    gradients,
    leaves_of,
    run,
    same_bits,
    total,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpref


@contextmanager
def defaults_elsewhere() -> Iterator[None]:
    """New tensors are float64 and on no device, if whoever makes them does not say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch refuses what may differ from run to run, and fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def states_elsewhere() -> Iterator[None]:
    """What is saved for the backward pass leaves and comes back as other tensors."""
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        yield


CONTEXTS = [defaults_elsewhere, deterministic, states_elsewhere]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("compact", [True, False])
def test_no_bit_changes(compact, context):
    for name, trained in WAYS:
        expected = run(name, trained, compact)
        given = batch(trains=() if trained is None else leaves_of(trained))
        with context(), torch.set_grad_enabled(trained is not None):
            found = EVERY[name](given, compact)
            of_leaves = [] if trained is None else gradients(given, total(found))
        results = [*(one.detach() for one in flat(found)), *of_leaves]
        assert same_bits(results, expected), name


@pytest.mark.parametrize("name", EVERY)
def test_inference_mode(name):
    with torch.inference_mode():
        found = flat(EVERY[name](batch(), True))
    assert same_bits(found, run(name, None)) and all(one.is_inference() for one in found)


READ_BY_HEADS = ("hidden", "weight", "bias", "states", "teacher", "of_teacher")


@pytest.mark.parametrize("name", HEADED)
def test_autocast_within_autocast(name):
    """The innermost says in which dtype heads are read; where it is disabled, their own."""
    given = batch()

    def read(dtype: torch.dtype) -> list[Tensor]:
        narrow = {key: given[key].to(dtype) for key in READ_BY_HEADS}
        return flat(HEADED[name](given | narrow, True))

    def called() -> list[Tensor]:
        return flat(HEADED[name](given, True))

    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outer = called()
            with torch.autocast("cpu", dtype=torch.float16):
                inner = called()
            with torch.autocast("cpu", enabled=False):
                disabled = called()
            again = called()
        assert same_bits(outer, read(torch.bfloat16)) and same_bits(again, outer)
        assert same_bits(inner, read(torch.float16))
        assert same_bits(disabled, read(torch.float32)) and not same_bits(disabled, outer)


@pytest.mark.parametrize(("name", "trained"), WITH_GRADIENT)
def test_backward_may_run_inside_autocast_or_outside(name, trained):
    found = []
    for inside in (True, False):
        given = batch(trains=leaves_of(trained))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = total(EVERY[name](given, True))
            if inside:
                found.append(gradients(given, loss))
        if not inside:
            found.append(gradients(given, loss))
    assert same_bits(*found)
    assert all(one.dtype == torch.float32 for one in found[0])


@pytest.mark.parametrize(("name", "trained"), WITH_GRADIENT)
def test_a_retained_graph_gives_the_same_gradients_again(name, trained):
    given = batch(trains=leaves_of(trained))
    loss = total(EVERY[name](given, True))
    assert same_bits(gradients(given, loss, retain_graph=True), gradients(given, loss))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(given, loss)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("name", "trained"), WITH_GRADIENT)
def test_checkpointing(name, trained, reentrant):
    """The loss is computed a second time in the backward pass, to the same bits."""
    calls: list[int] = []

    def loss(*leaves: Tensor) -> Tensor:
        calls.append(1)
        found = EVERY[name](given | dict(zip(names, leaves, strict=True)), True)
        return flat(found)[0].square().sum()  # in the first pass of a reentrant one no gradients

    names, found = leaves_of(trained), []
    for checkpointed in (False, True):
        given = batch(trains=names)
        leaves = [given[one] for one in names]
        value = (
            checkpoint(loss, *leaves, use_reentrant=reentrant) if checkpointed else loss(*leaves)
        )
        value.backward()
        found.append([value.detach(), *(one.grad for one in leaves)])
    assert same_bits(*found)
    assert len(calls) == 3


@pytest.mark.parametrize(("name", "trained"), WITH_GRADIENT)
def test_hooks_see_gradients_and_may_change_them(name, trained):
    """Doubled on the way in, a gradient is doubled on the way out, and doubled again behind."""
    found, seen = [], []
    for hooked in (False, True):
        given = batch(trains=leaves_of(trained))
        outputs = EVERY[name](given, True)
        if hooked:
            for one in (*flat(outputs), given["hidden"]):
                if one.requires_grad:
                    one.register_hook(lambda gradient: seen.append(1) or 2 * gradient)
        found.append(gradients(given, total(outputs)))
    hidden, *of_head = found[0]
    assert same_bits(found[1], [4 * hidden, *(2 * one for one in of_head)])
    assert len(seen) >= 2


def test_hooks_of_a_module():
    class Loss(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
            return fastpref.linear_logps(hidden, weight, batch()["labels"])

    given, seen = batch(trains=("hidden", "weight")), []
    module = Loss()
    module.register_full_backward_pre_hook(lambda _, incoming: seen.append(incoming))
    module.register_full_backward_hook(lambda _, found, incoming: seen.append(found))
    module(given["hidden"], given["weight"]).sum().backward()
    assert torch.equal(seen[0][0], torch.ones(4, 3))
    assert same_bits(seen[1], [given["hidden"].grad, given["weight"].grad])


@pytest.mark.parametrize("changed", ["hidden", "weight", "labels"])
def test_what_backward_needs_must_not_be_written_to(changed):
    """PyTorch sees it, since all of it is saved where it looks."""
    given = batch(trains=("hidden", "weight"))
    loss = fastpref.linear_logps(given["hidden"], given["weight"], given["labels"]).sum()
    given[changed].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def in_threads(work: Callable[[], object], count: int = 4) -> None:
    """Do it several times at once; what one raises is raised."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=guarded) for _ in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if errors:
        raise errors[0]


def test_four_threads_at_once():
    """Among them such as have autocast or no gradients, which are of a thread alone."""
    expected = [run(*way) for way in WAYS]

    def work() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            EVERY["linear_logps"](batch(), True)
        for way, one in zip(WAYS, expected, strict=True):
            assert same_bits(run(*way), one), way

    in_threads(work)
