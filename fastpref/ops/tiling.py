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
ACCELERATOR_TILE_BYTES = 128 * 2**20
# On a GPU several tiles are the operand of one second product, which the more columns it sums over
# the more seldom reads and writes what it adds to.
ACCELERATOR_OPERAND_BYTES = 128 * 2**20
# Two tiles of some rows and the whole vocabulary: so many rows share one reading of two heads.
CPU_BLOCK_BYTES = 192 * 2**20
CPU_BLOCKS = 4  # at least, so that a block is a small part of all logits; but of few rows
CPU_FEWEST_ROWS = 64
ACCELERATOR_BLOCK_BYTES = 512 * 2**20
# What is computed elementwise goes through a CPU's cache in pieces, of which several are needed.
CPU_PIECE_BYTES = 768 * 2**10
ACCELERATOR_PIECE_BYTES = 64 * 2**20
COLUMN_MULTIPLE = 128
FEWEST_COLUMNS = 384  # of a tile, but for the last one
ALIGNMENT = 16  # bytes: every view of kept tiles starts where vector loads can
# GPU products want rows of whole 16 bytes; the rest of the vocabulary is a tile of its own.
VECTOR_COLUMNS = 8
# A GPU computes blocks of so many rows and columns of a product at once, one a multiprocessor.
BLOCK_ROWS, BLOCK_COLUMNS = 128, 256
FULL_ENOUGH = 0.9  # of the multiprocessors, on average until the last is done


class Tiling(NamedTuple):
    """A grid over ``rows`` x ``vocab_size`` projections.

    Tiles come from one product each. A stretch of rows and a stretch of columns, of one tile or
    several, is the operand of one second product.
    """

    rows: int
    vocab_size: int
    row_step: int
    column_step: int
    tiles_across: int  # of a stretch of columns
    stretch_rows: int  # a multiple of row_step, or all rows
    tail: int  # columns at the end of the vocabulary that are a stretch of their own

    def is_in_place(self) -> bool:
        """Whether one tile is all of the operand of one second product."""
        return self.tiles_across == 1 and self.stretch_rows == self.row_step

    def row_stretches(self) -> Iterator[slice]:
        """Rows of one second product after another, in order."""
        return blocks(0, self.rows, self.stretch_rows)

    def row_blocks(self, stretch: slice | None = None) -> Iterator[slice]:
        """Rows of one tile after another, of a stretch or of all rows."""
        start, stop = (0, self.rows) if stretch is None else (stretch.start, stretch.stop)
        return blocks(start, stop, self.row_step)

    def column_stretches(self) -> Iterator[slice]:
        """Columns of one second product after another, in order."""
        whole = self.vocab_size - self.tail
        yield from blocks(0, whole, self.column_step * self.tiles_across)
        yield from blocks(whole, self.vocab_size, VECTOR_COLUMNS)

    def column_blocks(self, stretch: slice | None = None) -> Iterator[slice]:
        """Columns of one tile after another, of a stretch or of the whole vocabulary."""
        if stretch is not None:
            return blocks(stretch.start, stretch.stop, self.column_step)
        return (block for one in self.column_stretches() for block in self.column_blocks(one))

    def tile_buffer(self, like: Tensor) -> Tensor:
        """Memory for the largest tile; `carve` gives it the shape of any."""
        return like.new_empty(self.row_step * padded(self.column_step))

    def operand_buffer(self, like: Tensor) -> Tensor:
        """Memory for the largest operand of a second product."""
        return like.new_empty(self.stretch_rows * padded(self.column_step * self.tiles_across))


def grid_by_rows(rows: int, hidden_size: int, vocab_size: int, like: Tensor) -> Tiling:
    """For what is finished of some rows before the next ones begin: sums over the vocabulary.

    On a GPU a second product has ``hidden_size`` columns; where these are few, it gets more rows.
    """
    if like.device.type == "cpu":
        return _cpu_grid(rows, vocab_size, like)
    step = ROWS_PER_TILE
    while step < rows and _occupancy(step, hidden_size, like.device) < FULL_ENOUGH:
        step *= 2
    row_step = _even_step(rows, step)
    columns = _columns(ACCELERATOR_TILE_BYTES, row_step, like.dtype.itemsize)
    across = max(1, _columns(ACCELERATOR_OPERAND_BYTES, row_step, 2) // columns)
    return _accelerator_grid(rows, vocab_size, row_step, columns, across, row_step)


def grid_by_columns(rows: int, hidden_size: int, vocab_size: int, like: Tensor) -> Tiling:
    """For what is finished of some columns before the next ones begin: the head's gradient.

    On a GPU that is one product of a stretch of columns with ``hidden_size`` others.
    """
    if like.device.type == "cpu":
        return _cpu_grid(rows, vocab_size, like)
    row_step = _even_step(rows, ROWS_PER_TILE)
    widest = max(_columns(ACCELERATOR_OPERAND_BYTES, rows, 2), 8 * COLUMN_MULTIPLE)
    stretch = max(
        range(widest, widest // 2, -COLUMN_MULTIPLE),
        key=lambda width: min(_occupancy(width, hidden_size, like.device), FULL_ENOUGH),
    )
    # Half of what one reading of the vocabulary may use: the sums of all rows are there, too.
    largest = _columns(ACCELERATOR_TILE_BYTES // 2, row_step, like.dtype.itemsize)
    across = -(-stretch // largest)
    columns = _columns(stretch, across, 1)
    return _accelerator_grid(rows, vocab_size, row_step, columns, across, rows)


def rows_per_block(rows: int, vocab_size: int, like: Tensor, *, tiles: int = 2) -> int:
    """For what needs several numbers of every token at once: blocks of rows, all alike."""
    on_cpu = like.device.type == "cpu"
    budget = CPU_BLOCK_BYTES if on_cpu else ACCELERATOR_BLOCK_BYTES
    largest = min(budget // (tiles * padded(vocab_size) * like.dtype.itemsize), ROWS_PER_TILE)
    if on_cpu:
        largest = min(largest, max(CPU_FEWEST_ROWS, -(-rows // CPU_BLOCKS)))
    return _even_step(rows, max(1, largest), multiple=1)


def rows_per_piece(vocab_size: int, like: Tensor) -> int:
    """Rows of a block that are computed elementwise at once."""
    budget = CPU_PIECE_BYTES if like.device.type == "cpu" else ACCELERATOR_PIECE_BYTES
    return max(1, budget // (padded(vocab_size) * like.dtype.itemsize))


def columns_per_cast(hidden_size: int, like: Tensor) -> int:
    """Columns of the vocabulary whose operands are cast to another dtype at once."""
    budget = CPU_TILE_BYTES if like.device.type == "cpu" else ACCELERATOR_TILE_BYTES
    return _columns(budget, hidden_size, like.dtype.itemsize)


def rows_per_gather(width: int, like: Tensor) -> int:
    """Rows of which so many numbers are gathered or multiplied at once."""
    budget = CPU_TILE_BYTES if like.device.type == "cpu" else ACCELERATOR_TILE_BYTES
    return max(1, budget // (max(1, width) * like.dtype.itemsize))


def _cpu_grid(rows: int, vocab_size: int, like: Tensor) -> Tiling:
    """One tile is the operand of one second product, and stays in the cache until then."""
    row_step = _even_step(rows, ROWS_PER_TILE, multiple=1)
    columns = min(vocab_size, _columns(CPU_TILE_BYTES, row_step, like.dtype.itemsize))
    return Tiling(rows, vocab_size, row_step, columns, 1, row_step, tail=0)


def _accelerator_grid(
    rows: int, vocab_size: int, row_step: int, columns: int, across: int, stretch_rows: int
) -> Tiling:
    tail = vocab_size % VECTOR_COLUMNS
    whole = max(vocab_size - tail, VECTOR_COLUMNS)
    columns = min(columns, whole)
    across = max(1, min(across, -(-whole // columns)))
    return Tiling(rows, vocab_size, row_step, columns, across, max(1, stretch_rows), tail)


def _columns(budget: int, rows: int, itemsize: int) -> int:
    """How many columns of so many rows a budget of bytes holds, in whole multiples."""
    return max(budget // (max(1, rows) * itemsize) // COLUMN_MULTIPLE, 1) * COLUMN_MULTIPLE


def _even_step(rows: int, largest: int, multiple: int = COLUMN_MULTIPLE) -> int:
    """The step that cuts rows into the fewest blocks, all alike: 4224 are not 4096 and 128."""
    blocks = max(1, -(-rows // largest))
    return max(1, min(rows, -(-rows // (blocks * multiple)) * multiple))


def _occupancy(rows: int, columns: int, device: torch.device) -> float:
    """Which part of the multiprocessors a product fills until its last blocks are done."""
    blocks = -(-rows // BLOCK_ROWS) * -(-columns // BLOCK_COLUMNS)
    waves = blocks / multiprocessors(device)
    return waves / -(-blocks // multiprocessors(device))


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 132, as on a Hopper, where nobody can say."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def carve(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """A (rows, columns) view of the start of a flat buffer, its rows whole vectors apart."""
    stride = padded(columns)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]


def padded(columns: int) -> int:
    """How far apart rows of so many columns are: whole vectors."""
    return -(-columns // VECTOR_COLUMNS) * VECTOR_COLUMNS


def blocks(start: int, stop: int, step: int) -> Iterator[slice]:
    """A range, cut into pieces of ``step``."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


class KeptTile(NamedTuple):
    """The tile of all rows and some columns, relative to a reference that later tiles may raise."""

    exponentials: Tensor  # (n, w) in the dtype of matrix products, damped; 0 at the label
    reference: Tensor  # (n,) in the dtype of statistics


class KeptTiles(NamedTuple):
    """A flat buffer of tiles for the backward pass: as many as fit of the first columns."""

    buffer: Tensor  # uint8
    grid: Tiling
    operands: torch.dtype
    statistics: torch.dtype

    def tile(self, columns: slice) -> KeptTile | None:
        """The place of one tile, or None for a tile that does not fit."""
        index, rest = divmod(columns.start, self.grid.column_step)
        width = columns.stop - columns.start
        start = index * self._bytes_of(self.grid.column_step)
        if rest or start + self._bytes_of(width) > self.buffer.numel():
            return None
        rows = self.grid.rows
        end = start + rows * padded(width) * self.operands.itemsize
        exponentials = self.buffer[start:end].view(self.operands)
        start = _aligned(end)
        reference = self.buffer[start : start + rows * self.statistics.itemsize]
        return KeptTile(carve(exponentials, rows, width), reference.view(self.statistics))

    def columns(self) -> int:
        """How many of the first columns are kept."""
        kept = (one.stop for one in self.grid.column_blocks() if self.tile(one) is not None)
        return max(kept, default=0)

    def _bytes_of(self, width: int) -> int:
        exponentials = self.grid.rows * padded(width) * self.operands.itemsize
        return _aligned(exponentials) + _aligned(self.grid.rows * self.statistics.itemsize)


def bytes_of_all_tiles(
    rows: int, vocab_size: int, operands: torch.dtype, statistics: torch.dtype
) -> int:
    """What it takes at most to keep every tile; ``rows`` may be symbolic."""
    tiles = vocab_size // FEWEST_COLUMNS + 2
    exponentials = rows * (vocab_size + 2 * VECTOR_COLUMNS) * operands.itemsize
    return exponentials + tiles * (rows * statistics.itemsize + 2 * ALIGNMENT)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
