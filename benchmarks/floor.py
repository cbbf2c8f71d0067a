"""The ceilings of a machine: how fast `torch.mm` multiplies, how fast memory is copied."""

import statistics
from dataclasses import dataclass

import torch
from head_shapes import DTYPES, HeadShape, InputSet, make_inputs
from timing import Clock, input_sets, repeat

# The product of one pass is cut into tiles of the vocabulary, as N x V numbers need not fit. Which
# tile is best depends on the machine; the floor takes the best, so nobody is flattered.
TILE_BYTES = {
    "cuda": (128 * 2**20, 512 * 2**20, 2 * 2**30),
    "cpu": (12 * 2**20, 128 * 2**20, 512 * 2**20),
}
COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28}


@dataclass(frozen=True)
class Floor:
    """The time of one pass, `hidden @ weight.T`, without anything else."""

    shape: str  # its key
    tokens: int
    seconds: float  # with the best tile
    tile_columns: int
    seconds_by_tile: dict[int, float]  # of every tile width tried

    def flops_per_second(self, shape: HeadShape) -> float:
        """What `torch.mm` reached."""
        return pass_flops(shape, self.tokens) / self.seconds


def pass_flops(shape: HeadShape, tokens: int) -> int:
    """Floating-point operations of one pass."""
    return 2 * tokens * shape.hidden_size * shape.vocab_size


def measure_floor(shape: HeadShape, tokens: int, device: str, seconds: float) -> Floor:
    """Time one pass at each tile size; `seconds` in all."""
    first = make_inputs(shape, tokens, 0, device)
    sets = [first] + [
        make_inputs(shape, tokens, seed, device)
        for seed in range(1, input_sets(first.nbytes(), device))
    ]
    found: dict[int, float] = {}
    for nbytes in TILE_BYTES[device]:
        columns = _tile_columns(shape, tokens, device, nbytes)
        if columns not in found:
            found[columns] = _pass_seconds(sets, columns, device, seconds / len(TILE_BYTES[device]))
    best = min(found, key=lambda columns: found[columns])
    return Floor(shape.key, tokens, found[best], best, found)


def _tile_columns(shape: HeadShape, tokens: int, device: str, nbytes: int) -> int:
    columns = nbytes // (tokens * DTYPES[device].itemsize)
    return min(shape.vocab_size, max(columns // 128 * 128, 128))


def _pass_seconds(sets: list[InputSet], columns: int, device: str, seconds: float) -> float:
    hidden = sets[0].hidden
    buffer = hidden.new_empty(len(hidden), min(columns, len(sets[0].weight)))

    def one_pass(number: int, clock: Clock) -> None:
        inputs = sets[number % len(sets)]
        for start in range(0, len(inputs.weight), columns):
            tile = inputs.weight[start : start + columns]
            # The last tile is narrower: a contiguous part of the buffer, like every other.
            out = buffer.view(-1)[: len(hidden) * len(tile)].view(len(hidden), len(tile))
            torch.mm(inputs.hidden, tile.T, out=out)

    with torch.no_grad():
        return statistics.median(sum(times) for times in repeat(one_pass, device, seconds))


def measure_copy(device: str, seconds: float) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.rand(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)

    def copy(number: int, clock: Clock) -> None:
        target.copy_(source)

    median = statistics.median(sum(times) for times in repeat(copy, device, seconds))
    return 2 * source.nbytes / median
