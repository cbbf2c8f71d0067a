"""How rows and vocabulary are cut into tiles, and the tiles that are kept for the backward pass."""

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
ALIGNMENT = 16  # bytes: every view of kept tiles starts where vector loads can


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

    def buffer(self, like: Tensor) -> Tensor:
        """Memory for the largest tile; `carve` gives it the shape of any."""
        return like.new_empty(self.row_step * self.column_step)

    def column_tiles(self) -> int:
        """Number of stretches of the vocabulary."""
        return -(-self.vocab_size // self.column_step)


def tile_grid(rows: int, vocab_size: int, like: Tensor) -> Tiling:
    """Cut ``rows`` x ``vocab_size`` projections of the dtype and device of ``like`` into tiles."""
    row_step = max(1, min(rows, ROWS_PER_TILE))
    budget = CPU_TILE_BYTES if like.device.type == "cpu" else ACCELERATOR_TILE_BYTES
    columns = budget // (row_step * like.dtype.itemsize) // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    return Tiling(rows, vocab_size, row_step, min(vocab_size, max(columns, COLUMN_MULTIPLE)))


def carve(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """A contiguous (rows, columns) view of the start of a flat buffer."""
    return buffer[: rows * columns].view(rows, columns)


def _blocks(stop: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))


class CachedTile(NamedTuple):
    """One tile, relative to a maximum: its probabilities are ``exp(maximum - lse)`` times it."""

    exponentials: Tensor  # (n, w) in the dtype of matrix products, times the slope; 0 at the label
    maximum: Tensor  # (n,) in the dtype of statistics


class TileCache(NamedTuple):
    """A flat buffer of exponentials: of every row the same leading columns, in whole tiles."""

    buffer: Tensor  # uint8
    grid: Tiling
    operands: torch.dtype
    statistics: torch.dtype

    def tile(self, rows: slice, columns: slice) -> CachedTile | None:
        """The place of one tile, or None for a tile that does not fit."""
        grid, count, width = self.grid, rows.stop - rows.start, columns.stop - columns.start
        index = columns.start // grid.column_step
        kept = min(grid.column_tiles(), self.buffer.numel() // self._bytes_of_column_tile())
        if index >= kept:
            return None
        start = rows.start // grid.row_step * kept * self._bytes_of_tile(grid.row_step)
        start += index * self._bytes_of_tile(count)
        exponentials = self._view(start, count * width, self.operands).view(count, width)
        start += _aligned(count * grid.column_step * self.operands.itemsize)
        return CachedTile(exponentials, self._view(start, count, self.statistics))

    def bytes_of_all(self) -> int:
        """What it takes to keep every tile."""
        return self.grid.column_tiles() * self._bytes_of_column_tile()

    def _bytes_of_column_tile(self) -> int:
        full, rest = divmod(self.grid.rows, self.grid.row_step)
        return full * self._bytes_of_tile(self.grid.row_step) + self._bytes_of_tile(rest)

    def _bytes_of_tile(self, count: int) -> int:
        exponentials = count * self.grid.column_step * self.operands.itemsize
        return _aligned(exponentials) + _aligned(count * self.statistics.itemsize)

    def _view(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        return self.buffer[start : start + count * dtype.itemsize].view(dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
