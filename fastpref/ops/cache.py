"""Tiles of exponentials that the forward pass keeps for the backward pass, within a byte budget."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.ops.tiling import Tiling

ALIGNMENT = 16  # bytes: every view starts where vector loads can


class CachedTile(NamedTuple):
    """One tile, relative to a maximum: its probabilities are ``exp(maximum - lse)`` times it."""

    exponentials: Tensor  # (n, w) in the dtype of matrix products, times the slope; 0 at the label
    maximum: Tensor  # (n,) in the dtype of statistics


class TileCache(NamedTuple):
    """A flat buffer cut into tiles: of every row the same leading columns, in whole tiles."""

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
