"""What a GPU would have to compute and hold at the sizes of real models, on tensors without data.

Products and tile kernels, which allocate nothing, are replaced by counters; everything else runs as
it is, on the meta device.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.ops import backward, forward
from fastpref.ops.linear_logps_op import scaled_jacobian_op
from fastpref.ops.transform import LogitTransform

HEADS = {  # vocabulary, hidden size
    "Llama-3.2-1B": (128_256, 2048),
    "Qwen3-1.7B": (151_936, 2048),
    "Gemma-3-1B": (262_144, 1152),
    "Llama-3.1-8B": (128_256, 4096),
}
ROWS = (4096, 16_384)
LIMIT = 512 * 2**20


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once of what was allocated inside; inputs do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in args:
            self._track(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            self._track(tensor, counts=True)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result

    def _track(self, tensor: object, *, counts: bool) -> None:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes() if counts else 0
                weakref.finalize(storage, self.alive.pop, storage._cdata)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The FLOPs of every product that the code under test asks for."""
    flops: list[int] = []

    def count(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
        assert out.shape == (left.shape[0], right.shape[1])
        flops.append(2 * left.shape[0] * left.shape[1] * right.shape[1])

    def nothing(*_: object) -> None: ...

    for module in (forward, backward):
        monkeypatch.setattr(module, "multiply", count)
        monkeypatch.setattr(module, "operand_dtype", lambda tensor: tensor.dtype)
        stub = SimpleNamespace(fold_tile=nothing, gradient_tile=nothing)
        monkeypatch.setattr(module, "tile_functions", lambda _, stub=stub: stub)
    return flops


def operands(
    rows: int, vocab: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, None, Tensor]:
    hidden = torch.empty(rows, width, dtype=dtype, device="meta")
    weight = torch.empty(vocab, width, dtype=dtype, device="meta")
    return hidden, weight, None, torch.empty(rows, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head", HEADS)
def test_frozen_head(products, head, rows, dtype):
    inputs = operands(rows, *HEADS[head], dtype)
    with PeakBytes() as step:
        _, jacobian = forward.statistics_and_jacobian(*inputs, LogitTransform())
        gradient = torch.empty_like(inputs[0])
        scaled_jacobian_op(torch.empty(rows, device="meta"), jacobian, inputs[0].dtype)
    vocab, width = HEADS[head]
    assert sum(products) == 2 * (2 * rows * vocab * width)
    assert step.peak - gradient.nbytes <= LIMIT


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head", HEADS)
def test_trained_head(products, head, rows):
    hidden, weight, bias, labels = operands(rows, *HEADS[head])
    numbers = torch.empty(rows, device="meta")
    hidden_gradient = torch.empty_like(hidden, dtype=torch.float32)
    with PeakBytes() as step:
        backward.gradients(
            hidden, weight, bias, labels, LogitTransform(), numbers, numbers, numbers, numbers,
            cache=torch.empty(0, dtype=torch.uint8, device="meta"),
            hidden_gradient=hidden_gradient,
            weight_gradient=torch.empty_like(weight),
            bias_gradient=None,
        )  # fmt: skip
    vocab, width = HEADS[head]
    assert sum(products) == 3 * (2 * rows * vocab * width)
    weight_gradient = weight.nbytes
    assert step.peak + hidden_gradient.nbytes - weight_gradient - hidden.nbytes <= LIMIT
