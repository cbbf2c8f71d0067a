"""With ``compact=False`` nothing waits for the device, so that a CUDA graph can hold all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpref import linear_logps, linear_logps_with_stats, tvkd_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

Inputs = dict[str, Tensor]


def make_inputs(seed: int) -> Inputs:
    torch.manual_seed(seed)
    labels = torch.randint(5000, (4, 40), device="cuda")
    labels[:, :7] = -100
    return {
        "hidden": torch.randn(4, 40, 64, device="cuda", dtype=torch.bfloat16),
        "weight": torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16),
        "labels": labels,
        "shaping": torch.randn(4, device="cuda"),
    }


def no_gradient(inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        arguments = (inputs["hidden"], inputs["weight"], inputs["labels"])
        stats = linear_logps_with_stats(*arguments, compact=False)
        return [linear_logps(*arguments, compact=False), *stats]


def with_gradients(trains: bool) -> Callable[[Inputs], list[Tensor]]:
    def run(inputs: Inputs) -> list[Tensor]:
        leaves = [inputs["hidden"], inputs["weight"]]
        wanted = leaves if trains else leaves[:1]
        for leaf in wanted:
            leaf.requires_grad_()
        loss = tvkd_loss(*leaves, inputs["labels"], inputs["shaping"], compact=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    return run


@pytest.mark.parametrize(
    "run",
    [no_gradient, with_gradients(False), with_gradients(True)],
    ids=["no gradient", "frozen", "trained"],
)
def test_a_captured_graph_replays_with_other_inputs(run):
    held = make_inputs(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(held)

    for seed in (1, 2):
        fresh = make_inputs(seed)
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(fresh[name])
        graph.replay()
        for found, expected in zip(captured, run(fresh), strict=True):
            torch.testing.assert_close(found, expected)
