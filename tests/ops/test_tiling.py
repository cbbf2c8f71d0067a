"""Tiles cover everything once, and stay within their budgets of memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.ops import tiling
from fastpref.ops.tiling import KeptTiles, Tiling, grid_by_columns, grid_by_rows, padded

DEVICES = ("cpu", "meta")  # what is no CPU counts as an accelerator
ROWS = st.sampled_from([1, 100, 4096, 4224, 40_000])
VOCABULARIES = st.sampled_from([1, 8, 1031, 49_152])
DTYPES = st.sampled_from([torch.float32, torch.float64])


def grids(rows: int, width: int, vocab_size: int, like: torch.Tensor) -> list[Tiling]:
    return [grid(rows, width, vocab_size, like) for grid in (grid_by_rows, grid_by_columns)]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=8)
@given(rows=ROWS, width=st.sampled_from([1, 64, 4096]), vocab_size=VOCABULARIES, dtype=DTYPES)
def test_grids(device, rows, width, vocab_size, dtype):
    like = torch.empty(0, dtype=dtype, device=device)
    of_tile, of_operand = tiling.CPU_TILE_BYTES, tiling.CPU_TILE_BYTES
    if device != "cpu":
        of_tile, of_operand = tiling.ACCELERATOR_TILE_BYTES, tiling.ACCELERATOR_OPERAND_BYTES
    for grid in grids(rows, width, vocab_size, like):
        assert [one.start for one in grid.row_blocks()] == list(range(0, rows, grid.row_step))
        assert sum(one.stop - one.start for one in grid.row_blocks()) == rows
        end = 0
        for stretch in grid.column_stretches():
            for columns in grid.column_blocks(stretch):
                assert columns.start == end and 0 < columns.stop - end <= grid.column_step
                end = columns.stop
            assert end == stretch.stop
        assert end == vocab_size
        # At least so many columns, whatever the budget.
        tile, operand = grid.tile_buffer(like), grid.operand_buffer(like.to(torch.bfloat16))
        least = grid.row_step * 8 * tiling.COLUMN_MULTIPLE
        assert tile.numel() == grid.row_step * padded(grid.column_step)
        assert tile.nbytes <= max(of_tile, least * like.itemsize)
        assert operand.numel() == grid.stretch_rows * padded(grid.column_step * grid.tiles_across)
        assert operand.nbytes <= max(of_operand, grid.stretch_rows * 9 * tiling.COLUMN_MULTIPLE * 2)
        assert grid.is_in_place() == (operand.numel() == tile.numel())


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=8)
@given(rows=ROWS, vocab_size=VOCABULARIES, dtype=DTYPES, tiles=st.sampled_from([1, 2]))
def test_blocks_of_rows(device, rows, vocab_size, dtype, tiles):
    like = torch.empty(0, dtype=dtype, device=device)
    on_cpu = device == "cpu"
    budget = tiling.CPU_BLOCK_BYTES if on_cpu else tiling.ACCELERATOR_BLOCK_BYTES
    step = tiling.rows_per_block(rows, vocab_size, like, tiles=tiles)
    row_bytes = tiles * padded(vocab_size) * like.itemsize
    most = max(1, min(budget // row_bytes, tiling.ROWS_PER_TILE))
    if on_cpu:
        most = min(most, max(tiling.CPU_FEWEST_ROWS, -(-rows // tiling.CPU_BLOCKS)))
    count = -(-rows // most)  # as few as possible, and all alike
    assert step == -(-rows // count)
    piece = tiling.rows_per_piece(vocab_size, like) * padded(vocab_size) * like.itemsize
    of_piece = tiling.CPU_PIECE_BYTES if on_cpu else tiling.ACCELERATOR_PIECE_BYTES
    assert piece <= max(of_piece, padded(vocab_size) * like.itemsize)
    assert 2 * piece > of_piece or piece > of_piece - padded(vocab_size) * like.itemsize


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=8)
@given(rows=ROWS, vocab_size=VOCABULARIES, dtype=DTYPES)
def test_all_tiles_fit_where_all_are_kept(device, rows, vocab_size, dtype):
    like = torch.empty(0, dtype=dtype, device=device)
    size = tiling.bytes_of_all_tiles(rows, vocab_size, torch.bfloat16, dtype)
    buffer = torch.empty(size, dtype=torch.uint8, device="meta")
    for grid in grids(rows, 64, vocab_size, like):
        kept = KeptTiles(buffer, grid, torch.bfloat16, dtype)
        assert kept.columns() == vocab_size
        end = 0
        for columns in grid.column_blocks():
            tile = kept.tile(columns)
            assert tile.exponentials.shape == (rows, columns.stop - columns.start)
            start = tile.exponentials.storage_offset() * 2  # bytes
            assert start % tiling.ALIGNMENT == 0 and start >= end
            end = tile.reference.storage_offset() * dtype.itemsize + tile.reference.nbytes
            assert end <= size
        short = KeptTiles(buffer[: end - 1], grid, torch.bfloat16, dtype)
        assert short.columns() == columns.start


def test_rows_are_cut_evenly():
    like = torch.empty(0)
    assert grid_by_rows(4224, 64, 1000, like).row_step == 2112
    assert grid_by_rows(4096, 64, 1000, like).row_step == 4096
    assert tiling.rows_per_block(300, 1000, like) == 75


def test_columns_are_whole_multiples():
    like = torch.empty(0)
    assert tiling.columns_per_cast(4096, like) == 768  # 12 MiB
    assert tiling.columns_per_cast(10**7, like) == tiling.COLUMN_MULTIPLE
    assert tiling.rows_per_gather(4096, like) == 768 and tiling.rows_per_gather(10**8, like) == 1
    assert tiling.rows_per_gather(0, like) == 12 * 2**20 // 4
    assert [padded(one) for one in (1, 8, 9)] == [8, 8, 16]
