"""How the rows and the vocabulary are cut into tiles that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# So many rows share one reading of the weight.
ROWS_PER_TILE = 4096
# A CPU tile stays in the last-level cache between two matrix products; a GPU tile gives one product
# enough work to fill the device.
CPU_TILE_BYTES = 12 * 2**20
ACCELERATOR_TILE_BYTES = 64 * 2**20
COLUMN_MULTIPLE = 128


class Tiling(NamedTuple):
    """A grid over ``rows`` x ``vocab_size`` projections."""

    rows: int
    vocab_size: int
    row_step: int
    column_step: int

    def row_blocks(self) -> Iterator[slice]:
        """Stretches of rows, in order."""
        return _blocks(self.rows, self.row_step)

    def column_blocks(self) -> Iterator[slice]:
        """Stretches of the vocabulary, in order."""
        return _blocks(self.vocab_size, self.column_step)

    def buffer(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Memory for the largest tile; `carve` gives it the shape of any."""
        return torch.empty(self.row_step * self.column_step, device=device, dtype=dtype)

    def operand_buffer(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """The same in the dtype of matrix products: ``buffer`` itself if it has that dtype."""
        return buffer if buffer.dtype == dtype else self.buffer(buffer.device, dtype)

    def column_tiles(self) -> int:
        """Number of stretches of the vocabulary."""
        return -(-self.vocab_size // self.column_step)


def tile_grid(rows: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> Tiling:
    """Cut ``rows`` x ``vocab_size`` projections into tiles of ``dtype`` for ``device``."""
    row_step = max(1, min(rows, ROWS_PER_TILE))
    budget = CPU_TILE_BYTES if device.type == "cpu" else ACCELERATOR_TILE_BYTES
    columns = budget // (row_step * dtype.itemsize) // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    return Tiling(rows, vocab_size, row_step, min(vocab_size, max(columns, COLUMN_MULTIPLE)))


def carve(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """A contiguous (rows, columns) view of the start of a flat buffer."""
    return buffer[: rows * columns].view(rows, columns)


def _blocks(stop: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))
