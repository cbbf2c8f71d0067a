"""Launch every kernel of fastpref at odd shapes, and hold that it gives numbers.

Sanitizers watch this script: ``gpu_check.py`` beside it runs it under each of them. On a CPU, under
``TRITON_INTERPRET=1`` and with ``--guarded``, fenced.py stands in for two of them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fenced import Fenced
from planted import PLANTED
from torch import Tensor

import fastpref
from fastpref.kernels import divergences, launch, logsumexp, statistics, tiles
from fastpref.kernels.divergence_kinds import KINDS
from fastpref.kernels.logsumexp_persistent import persistent_logsumexp
from fastpref.kernels.numerics import LOWEST
from fastpref.kernels.pair_losses import LOSSES, pair_losses

SEEN = 77  # the exit code after an error that was planted
NAN = float("nan")
EVERYWHERE = "cuda" if torch.cuda.is_available() else "cpu"


class Transform(NamedTuple):
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


PLAIN, CAPPED = Transform(), Transform(0.5, 30.0, 0.7)


class Device(NamedTuple):
    """Where tensors are made. Their values do not depend on it."""

    name: str

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        random = torch.Generator().manual_seed(sum(shape))
        return torch.randn(*shape, generator=random).to(self.name, dtype)

    def apart(self, matrix: Tensor) -> Tensor:
        """The same rows with gaps of NaN between them."""
        n_rows, width = matrix.shape
        return matrix.new_full((n_rows, width + 3), NAN)[:, :width].copy_(matrix)

    def rows(self, n_rows: int, width: int) -> Tensor:
        return self.apart(self.normal(n_rows, width))

    def labels(self, n_rows: int, end: int) -> Tensor:
        """Mostly inside a vocabulary; the first is ignored and the second beyond 32 bits."""
        found = torch.arange(n_rows) * 37 % end
        found[:2] = torch.tensor([-100, 2**32 + 1])[:n_rows]
        return found.to(self.name)

    def filled(self, n: int, value: float = 0.0) -> Tensor:
        return torch.full((n,), value).to(self.name)


Launched = list[Tensor]


def fold(on: Device) -> Launched:
    found = []
    shapes = (1, 1), (3, 301), (2, tiles.ROW_BLOCK + 3)
    for (n_rows, width), half in zip(shapes, (True, True, False), strict=True):
        tile, labels = on.rows(n_rows, width), on.labels(n_rows, width) + 100
        numbers = [on.filled(n_rows, LOWEST.value), *(on.filled(n_rows) for _ in range(4))]
        out = on.rows(n_rows, width).bfloat16() if half else tile
        earlier = (on.rows(n_rows, 7), on.rows(n_rows, 3).to(out.dtype))
        tiles.fold_tile(tile, labels, 100, CAPPED, *numbers, out, earlier)
        found += [out, *numbers, *earlier]
        few = [on.filled(n_rows, LOWEST.value), *(on.filled(n_rows) for _ in range(2))]
        tiles.fold_tile(on.rows(n_rows, width), None, 0, PLAIN, *few)
        found += few
    return found


def gradients_of_tiles(on: Device) -> Launched:
    found = []
    for n_rows, width in ((1, 1), (3, 301), (2, tiles.ROW_BLOCK + 3)):
        for labels, transform in ((None, PLAIN), (on.labels(n_rows, width) + 100, CAPPED)):
            numbers = [on.normal(n_rows + one)[one:] for one in range(4)]
            tile, kept = on.rows(n_rows, width), on.rows(n_rows, width).bfloat16()
            tiles.gradient_tile(tile, labels, 100, transform, *numbers[1:], tile)
            tiles.gradient_of_kept_tile(kept, labels, 100, *numbers, kept)
            found += [tile, kept]
    return found


def projections(on: Device) -> Iterator[tuple[Any, ...]]:
    """Hidden states, weight, bias, labels, rows and transform: one for each way to be tiled.

    No block divides any size.
    """
    few, many = 5, launch.FEW_ROWS + 3
    yield on.normal(1, 7), on.normal(1, 7), None, None, None, PLAIN
    for dtype in (torch.float32, torch.bfloat16):
        for n_rows, hidden_size, vocab_size in ((few, 48, 133), (many, 48, 67), (few, 33, 67)):
            hidden = on.normal(n_rows + 2, hidden_size, dtype=dtype)
            weight = on.normal(vocab_size, hidden_size, dtype=dtype)
            if hidden_size == 33:  # not to be read 16 bytes at a time
                hidden, weight = on.apart(hidden), weight.T.contiguous().T
            gathered = (torch.arange(n_rows) * 3 % (n_rows + 2)).to(on.name)
            bias, labels = on.normal(vocab_size, dtype=dtype), on.labels(n_rows, vocab_size)
            yield hidden, weight, bias, labels, gathered, CAPPED


def logsumexps(on: Device) -> Launched:
    return [
        number
        for given in projections(on)
        for number in with_label(given[3], *logsumexp.projection_logsumexp(*given))
    ]


def partials(on: Device) -> Launched:
    found = []
    for given in projections(on):
        if len(given[0]) <= launch.FEW_ROWS:  # they are tiled like many
            wanted = [given[3] is not None] * 3
            parts, target = statistics.projection_partials(*given, *wanted)
            found += with_label(given[3], parts, target)
    return found


def with_label(labels: Tensor | None, *found: Tensor) -> Launched:
    """What is found, the labels' logits as the last of it: NaN of the first two, without any."""
    *others, target = found
    if labels is not None:
        assert target[:2].isnan().all()
    return [*others, target[2:]]


def logsumexps_through_descriptors(on: Device) -> Launched:
    """Rows of whole 16 bytes; more of them than one block has, and more columns."""
    found = []
    config = launch.PERSISTENT_CONFIG
    for n_rows, hidden_size, vocab_size in ((1, 8, 1), (config.block_rows + 3, 72, 261)):
        hidden = on.normal(n_rows, hidden_size, dtype=torch.float16)
        weight = on.normal(vocab_size, hidden_size, dtype=torch.float16)
        labels = on.labels(n_rows, vocab_size)
        found += persistent_logsumexp(hidden, weight, None, None, PLAIN)
        bias = on.normal(vocab_size, dtype=torch.float16)
        target, parts = persistent_logsumexp(hidden, weight, bias, labels, CAPPED)
        found += with_label(labels, parts, target)
    return found


def compared(on: Device) -> Launched:
    found = []
    every_kind, one_kind = [*KINDS, "detached"], ["reverse_kl"]
    shapes = ((1, 301, every_kind), (3, 1, one_kind), (3, divergences.BLOCK + 3, one_kind))
    for n_rows, width, kinds in shapes:
        for kind in kinds:
            of_log_ratio, detached = kind == "advantage", kind == "detached"
            student, teacher = on.rows(n_rows, width), 2 * on.rows(n_rows, width)
            divergence, numbers = on.filled(n_rows), [on.filled(n_rows) for _ in range(4)]
            if of_log_ratio:
                reference = on.rows(n_rows, width)
                divergences.log_ratio_rows(teacher, reference, PLAIN, CAPPED, divergence)
            divergences.compare_rows(
                student, teacher, on.labels(n_rows, width), CAPPED,
                None if of_log_ratio else CAPPED, "skew_reverse_kl" if detached else kind, 0.3,
                detached, -5.0, 5.0, divergence, numbers, student, teacher,
            )  # fmt: skip
            found += [divergence, student, teacher, *with_label(divergence, *numbers)]
    # Nothing but the divergence; and the gradient in the student's memory, as 16 bits.
    student, teacher = on.normal(3, 301), on.rows(3, 301)
    given = (student, teacher, None, PLAIN, CAPPED, "jsd", 0.5, False, None, None)
    divergences.compare_rows(*given, divergence)
    gradient = student.view(torch.bfloat16)[:, :301]
    divergences.compare_rows(*given, divergence, (), gradient)
    return [*found, divergence, gradient]


def pairs(on: Device) -> Launched:
    """Lengths from none to more than a block; masked tokens are NaN."""
    found = []
    lengths = torch.tensor([0, 1, 1100, 0, 3, 1024, 7])
    mask = torch.arange(int(lengths.sum())) % 5 != 3
    logps = on.normal(len(mask)).abs().neg()
    for dtype in (torch.int32, torch.int64):
        offsets = lengths.cumsum(0).to(on.name, dtype)
        for loss in LOSSES:
            for numbers in (None, on.normal(len(lengths) - 1)):
                weights = None if numbers is None else on.normal(len(mask)).abs()
                found += pair_losses(
                    loss, logps.masked_fill(~mask.to(on.name), NAN), mask.to(on.name), offsets,
                    weights, numbers, numbers, 0.1, 1.0, 0.1, length_normalize=numbers is None,
                )  # fmt: skip
    return found


LAUNCHES: dict[str, Callable[[Device], Launched]] = {
    "fold": fold,
    "gradients of tiles": gradients_of_tiles,
    "logsumexps": logsumexps,
    "logsumexps through descriptors": logsumexps_through_descriptors,
    "statistics": partials,
    "divergences": compared,
    "pairs": pairs,
}


def launches() -> dict[str, Callable[[Device], Launched]]:
    """Those that this device has: copies by descriptors came with compute capability 9.0."""
    found = dict(LAUNCHES)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        del found["logsumexps through descriptors"]
    return found


def functions() -> dict[str, Any]:
    """Every function of `fastpref.kernels` that Triton compiles, by name."""
    kind = type(tiles._fold_tile_kernel)
    found = {}
    for file in sorted(Path(tiles.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"{fastpref.__name__}.kernels.{file.stem}")
        for name, one in vars(module).items():
            if isinstance(one, kind) and one.fn.__module__ == module.__name__:
                found[f"{file.stem}.{name}"] = one
    return found


@contextmanager
def noting() -> Iterator[set[str]]:
    """The names of the kernels that are launched inside."""
    found: set[str] = set()

    def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (found.add(name), run(*args, **kwargs))[1]

    kernels = {name: one for name, one in functions().items() if name.endswith("_kernel")}
    for name, one in kernels.items():
        one.run = noted(name, one.run)
    try:
        yield found
    finally:
        for one in kernels.values():
            del one.run


def check(name: str, found: Launched) -> None:
    """Every number is one: NaN is in gaps between rows and in fresh memory, and nowhere else."""
    for index, one in enumerate(found):
        if one.isnan().any():
            sys.exit(f"{name}: NaN in result {index} of shape {tuple(one.shape)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--guarded", choices=("after", "before"), help="a fence around every tensor"
    )
    parser.add_argument("--planted", choices=PLANTED, help="launch a kernel with this error, only")
    arguments = parser.parse_args()
    on = Device(EVERYWHERE)
    with Fenced(arguments.guarded) if arguments.guarded else nullcontext():
        if arguments.planted:
            found = PLANTED[arguments.planted](on.name)
            print("planted:", found.isnan().any().item())
            sys.exit(SEEN if found.isnan().any() else 0)
        with noting() as launched:
            for name, run in launches().items():
                check(name, run(on))
    if EVERYWHERE == "cuda":
        torch.cuda.synchronize()
    wanted = {name for name in functions() if name.endswith("_kernel")}
    if len(launches()) == len(LAUNCHES) and launched != wanted:
        sys.exit(f"not launched: {sorted(wanted - launched)}")
    print(f"launched {len(launched)} kernels of {len(wanted)}, Triton {triton.__version__}")


if __name__ == "__main__":
    main()
