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

from fastpref.ops import backward, forward, operands
from fastpref.ops.linear_logps_op import (
    gradients_of_operands,
    logps_and_more,
    scaled_jacobian_op,
)

HEADS = {  # vocabulary, hidden size
    "Llama-3.2-1B": (128_256, 2048),
    "Qwen3-1.7B": (151_936, 2048),
    "Gemma-3-1B": (262_144, 1152),
    "Llama-3.1-8B": (128_256, 4096),
}
ROWS = (4096, 16_384)
IGNORED = (0, 64)  # rows without a label: the others are gathered
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

    def nothing(*_: object, **__: object) -> None: ...

    monkeypatch.setattr(operands, "operand_dtype", lambda tensor: tensor.dtype)
    monkeypatch.setattr(operands, "multiply", count)
    for module in (forward, backward):
        monkeypatch.setattr(module, "multiply", count)
        stub = SimpleNamespace(fold_tile=nothing, gradient_tile=nothing)
        monkeypatch.setattr(module, "tile_functions", lambda _, stub=stub: stub)
    return flops


def arguments(
    monkeypatch, rows: int, ignored: int, vocab: int, width: int, dtype: torch.dtype
) -> tuple[object, ...]:
    """What every operator begins with."""
    labelled = torch.empty(rows - ignored, dtype=torch.int64, device="meta") if ignored else None
    monkeypatch.setattr(operands, "labelled_rows", lambda *_: labelled)
    hidden = torch.empty(rows, width, dtype=dtype, device="meta")
    weight = torch.empty(vocab, width, dtype=dtype, device="meta")
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    return hidden, weight, None, labels, 1.0, 1.0, None, -100, True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head", HEADS)
def test_frozen_head(monkeypatch, products, head, rows, ignored, dtype):
    vocab, width = HEADS[head]
    inputs = arguments(monkeypatch, rows, ignored, vocab, width, dtype)
    with PeakBytes() as step:
        _, _, jacobian, _, _ = logps_and_more(*inputs, True, False, 0)
        gradient = scaled_jacobian_op(torch.empty(rows, device="meta"), jacobian, dtype)
    assert sum(products) == 2 * (2 * (rows - ignored) * vocab * width)
    assert step.peak - gradient.nbytes <= LIMIT


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head", HEADS)
def test_trained_head(monkeypatch, products, head, rows, ignored):
    vocab, width = HEADS[head]
    inputs = arguments(monkeypatch, rows, ignored, vocab, width, torch.bfloat16)
    numbers = torch.empty(rows, device="meta")
    cache = torch.empty(0, dtype=torch.uint8, device="meta")
    with PeakBytes() as step:
        found = gradients_of_operands(
            *inputs, numbers, None, numbers, numbers, cache, True, True, False
        )
    assert sum(products) == 3 * (2 * (rows - ignored) * vocab * width)
    assert step.peak - sum(gradient.nbytes for gradient in found) <= LIMIT
