"""How the rows of `speed.py` are shown: ratios to the floor, a table, notes below it."""

from itertools import groupby
from typing import Any

from contenders import CONTENDERS, PASSES
from floor import Floor, pass_flops
from head_shapes import HeadShape
from points import Row
from report import MEGABYTE
from rich import box
from rich.console import Console
from rich.table import Table

# Of one floor's time; clocks and neighbours move it by less on a quiet machine.
LARGEST_DRIFT = 1.15


def add_floors(rows: list[Row], floors: list[Floor], shapes: list[HeadShape]) -> None:
    """Fill in every row's ratio to the floor, and the rate at which it did the floor's work."""
    by_key = {shape.key: shape for shape in shapes}
    seconds = {(floor.shape, floor.tokens): floor.seconds for floor in floors}
    for row in rows:
        if row.seconds:
            passes = PASSES[row.mode]
            row.floor_ratio = row.seconds / (passes * seconds[row.shape, row.tokens])
            work = passes * pass_flops(by_key[row.shape], row.tokens)
            row.useful_flops_per_second = work / row.seconds


def better_floors(first: list[Floor], second: list[Floor]) -> list[Floor]:
    """Of two measurements of the same floors, before and after the contenders, the faster ones."""
    return [min(pair, key=lambda floor: floor.seconds) for pair in zip(first, second, strict=True)]


def print_speed(
    console: Console,
    report: dict[str, Any],
    rows: list[Row],
    floors: list[Floor],
    shapes: list[HeadShape],
) -> None:
    """Print the table and what the reader must know to read it."""
    console.print(table(rows, floors, shapes))
    for note in [*notes(rows), *drift(report["floors"])]:
        console.print(note, style="red", markup=False)
    console.print(
        "x floor: time as a multiple of the matrix products that nobody can do without\n"
        "(no gradient 1 mm, frozen head 2, trained 3), by torch.mm in this run.\n"
        "extra MB: peak memory beyond inputs and gradients, 1 MB = 1e6 bytes.\n"
        f"Errors: relative to a {report['settings']['errors_relative_to']} run."
    )


def table(rows: list[Row], floors: list[Floor], shapes: list[HeadShape]) -> Table:
    """Make one table: a section for each head, number of tokens and mode."""
    result = Table(
        title="Log-probabilities of labels: time as a multiple of its floor, memory, errors",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("", no_wrap=True)
    for name in (
        "fwd\nms",
        "bwd\nms",
        "both\nms",
        "x\nfloor",
        "extra\nMB",
        "error\nhidden",
        "error\nweight",
    ):
        result.add_column(name, justify="right", no_wrap=True)
    by_key = {shape.key: shape for shape in shapes}
    by_point = {(floor.shape, floor.tokens): floor for floor in floors}
    shown = (row for row in rows if row.status != "missing")
    for key, of_shape in groupby(shown, lambda row: row.shape):
        result.add_row(f"[bold]{by_key[key].name}")
        for (tokens, mode), section in groupby(of_shape, lambda row: (row.tokens, row.mode)):
            title = "no gradient" if mode == "no-grad" else f"{mode} head"
            result.add_row(f"[bold]{tokens} tokens, {title}")
            floor, passes = by_point[key, tokens], PASSES[mode]
            floor_name = f"  floor: {passes} mm, {_rate(floor.flops_per_second(by_key[key]))}"
            result.add_row(floor_name, "", "", _milliseconds(passes * floor.seconds), "1.00")
            for row in section:
                result.add_row(f"  {CONTENDERS[row.contender].name}", *_cells(row))
            result.add_section()
    return result


def notes(rows: list[Row]) -> list[str]:
    """What is missing, wrong or failed, and why; each reason once."""
    return list(
        dict.fromkeys(
            f"{CONTENDERS[row.contender].name} {row.status}: {row.reason}"
            for row in rows
            if row.reason
        )
    )


def drift(floors: list[dict[str, Any]]) -> list[str]:
    """Say so where `torch.mm` itself was not the same before and after the contenders."""
    largest = max(
        max(floor["seconds_before_and_after"]) / min(floor["seconds_before_and_after"])
        for floor in floors
    )
    if largest < LARGEST_DRIFT:
        return []
    return [
        f"torch.mm took up to {largest:.2f}x as long at one end of this run as at the other: "
        "something else was running, and ratios to the floor are rough."
    ]


def _cells(row: Row) -> list[str]:
    if row.seconds is None or row.floor_ratio is None or row.peak_extra_bytes is None:
        status = row.status.replace(" of ", " of\n")  # a narrow column
        return ["", "", f"[red]{status}", "", "", *_errors(row)]
    return [
        _milliseconds(row.forward_seconds),
        _milliseconds(row.backward_seconds),
        _milliseconds(row.seconds),
        f"{row.floor_ratio:.2f}",
        f"{row.peak_extra_bytes / MEGABYTE:.0f}",
        *_errors(row),
    ]


def _errors(row: Row) -> list[str]:
    errors = (row.hidden_grad_error, row.weight_grad_error)
    return ["–" if error is None else f"{error:.0e}" for error in errors]


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"
