"""What a GPU would have to compute and hold at the sizes of real models, on tensors without data.

Products and tile kernels, which allocate nothing, are replaced by counters; everything else runs as
it is, on the meta device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from counting_engine import HostRead, Step, replaced
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.ops import operands, tiling
from fastpref.ops.linear_logps import AUTOMATIC_SCRATCH_BYTES
from fastpref.ops.linear_logps_op import (
    Found,
    gradient_by_jacobian,
    gradients_of_operands,
    logps_and_more,
)

HEADS = {  # vocabulary, hidden size
    "Llama-3.2-1B": (128_256, 2048),
    "Qwen3-1.7B": (151_936, 2048),
    "Gemma-3-1B": (262_144, 1152),
    "Llama-3.1-8B": (128_256, 4096),
}
ROWS = (4096, 16_384)
IGNORED = (0, 64)  # rows without a label: the others are gathered
LIMITS = {0: 512 * 2**20, AUTOMATIC_SCRATCH_BYTES: 1536 * 2**20}  # bytes, by those of scratch


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
def steps() -> Iterator[list[Step]]:
    """The products and kernels that the code under test asks for."""
    recorded: list[Step] = []
    with replaced(recorded):
        yield recorded


def flops(steps: list[Step]) -> int:
    return sum(step.flops for step in steps if not isinstance(step, HostRead))


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
def test_frozen_head(monkeypatch, steps, head, rows, ignored, dtype):
    vocab, width = HEADS[head]
    inputs = arguments(monkeypatch, rows, ignored, vocab, width, dtype)
    incoming = torch.empty(rows, device="meta")
    with PeakBytes() as step:
        found = Found(*logps_and_more(*inputs, True, False, 0))
        left = (incoming, None, found.running, found.rows, read_rows(rows, ignored))
        gradient = gradient_by_jacobian(*inputs, *left, found.jacobian)
    assert flops(steps) == 2 * (2 * (rows - ignored) * vocab * width)
    assert step.peak - gradient.nbytes <= LIMITS[0]


@pytest.mark.parametrize("scratch_bytes", LIMITS)
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head", HEADS)
def test_trained_head(monkeypatch, steps, head, rows, ignored, scratch_bytes):
    vocab, width = HEADS[head]
    inputs = arguments(monkeypatch, rows, ignored, vocab, width, torch.bfloat16)
    incoming = torch.empty(rows, device="meta")
    with PeakBytes() as step:
        found = Found(*logps_and_more(*inputs, False, False, scratch_bytes))
        left = (incoming, None, found.running, found.rows, read_rows(rows, ignored))
        gradients = gradients_of_operands(*inputs, *left, found.cache, True, True, False)
    passes = flops(steps) / (2 * (rows - ignored) * vocab * width)
    # A pass less what is kept, of which the last tile may not fit.
    kept = min(1, scratch_bytes / (2 * (rows - ignored) * vocab))
    assert 4 - kept <= passes <= 4 - 0.9 * kept + 0.04 * (kept > 0)
    assert step.peak - sum(gradient.nbytes for gradient in gradients) <= LIMITS[scratch_bytes]


def read_rows(rows: int, ignored: int) -> Tensor:
    return torch.tensor([rows - ignored])


@pytest.mark.parametrize("rows", [4224, 5000, 12_300])
def test_blocks_of_rows_are_alike(rows):
    for grid in (
        tiling.grid_by_rows(rows, 2048, 128_256, torch.empty(0, device="meta")),
        tiling.grid_by_columns(rows, 2048, 128_256, torch.empty(0, device="meta")),
    ):
        sizes = [block.stop - block.start for block in grid.row_blocks()]
        assert sum(sizes) == rows
        assert max(sizes) - min(sizes) <= len(sizes) * tiling.COLUMN_MULTIPLE


@pytest.mark.parametrize("vocab", [50_257, 32_001, 128_257, 128_256, 7, 8, 9])
@pytest.mark.parametrize("rows", [1, 64, 16_384])
def test_a_vocabulary_that_8_does_not_divide_leaves_a_tail(rows, vocab):
    """Every other operand begins and ends at whole vectors, and so do its rows."""
    like = torch.empty(0, device="meta")
    for grid in (
        tiling.grid_by_rows(rows, 2048, vocab, like),
        tiling.grid_by_columns(rows, 2048, vocab, like),
    ):
        stretches = list(grid.column_stretches())
        assert [one.start for one in stretches[1:]] == [one.stop for one in stretches[:-1]]
        assert stretches[0].start == 0 and stretches[-1].stop == vocab
        for columns in stretches:
            width = columns.stop - columns.start
            assert width % 8 == 0 or width == vocab % 8
            assert columns.start % 8 == 0
            assert tiling.carve(grid.operand_buffer(like), 1, width).stride(0) % 8 == 0


@pytest.mark.parametrize("width", [1152, 2048, 4096])
def test_second_products_fill_the_device(width):
    """Gemma's 1152 columns are 160 blocks on 132 multiprocessors with 4096 rows: 61 %."""
    like = torch.empty(0, device="meta")
    by_rows = tiling.grid_by_rows(16_384, width, 262_144, like)
    by_columns = tiling.grid_by_columns(16_384, width, 262_144, like)
    for rows in (by_rows.row_step, by_columns.column_step * by_columns.tiles_across):
        blocks = -(-rows // 128) * -(-width // 256)
        assert blocks / 132 / -(-blocks // 132) >= 0.9
