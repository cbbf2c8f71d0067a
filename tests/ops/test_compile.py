"""`torch.compile` of every option: no graph break, no compilation for each new length."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastpref import Head, linear_logps_with_stats, linear_logsumexp, linear_stats

VOCAB, WIDTH = 50, 8
LENGTHS = (6, 11, 300, 23)
OPTIONS = {
    "plain": {},
    "no scratch": {"scratch_bytes": 0},
    "little scratch": {"scratch_bytes": 5000},  # holds all of a short batch, some of a long one
    "all rows": {"compact": False},
    "all rows, little scratch": {"compact": False, "scratch_bytes": 5000},
    "temperature": {"temperature": 1.7, "ignore_index": -1},
}


def head_of(weight: torch.Tensor, bias: bool = False, **more: float) -> Head:
    return Head(weight, weight[:, 0].clone() if bias else None, **more)


def batch(length: int, ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, VOCAB, (length,))
    labels[: length // 3] = ignored
    return torch.randn(length, WIDTH, requires_grad=True), labels


@pytest.mark.parametrize(
    ("trained", "options"), [(False, "plain"), *((True, one) for one in OPTIONS)]
)
def test_gradients_compile_twice_whatever_the_lengths(trained, options):
    """Once for the first length, once for any other."""
    weight = torch.randn(VOCAB, WIDTH, requires_grad=trained)
    given = OPTIONS[options]

    def loss(hidden, weight, labels):
        found = linear_logps_with_stats(hidden, head_of(weight), labels, **given)
        return found.logps.square().sum() + found.lse.sum() + found.entropy.sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    wanted = slice(0, 2 if trained else 1)
    for length in LENGTHS:
        hidden, labels = batch(length, given.get("ignore_index", -100))
        found = torch.autograd.grad(compiled(hidden, weight, labels), (hidden, weight)[wanted])
        expected = torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight)[wanted])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count <= 2


@torch.no_grad()
def test_values_compile_twice_whatever_the_lengths():
    weight = torch.randn(VOCAB, WIDTH)

    def values(hidden, labels):
        stats = linear_stats(hidden, weight, labels, stats=["entropy", "target_logp"])
        return linear_logsumexp(hidden, weight), stats["entropy"], stats["target_logp"]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(values, backend=counter, fullgraph=True)
    for length in LENGTHS:
        for found, expected in zip(
            compiled(*batch(length, -100)[:2]), values(*batch(length, -100)), strict=True
        ):
            assert found.shape == expected.shape
    assert counter.frame_count <= 2
