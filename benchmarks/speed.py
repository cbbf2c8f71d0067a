"""Speed of log-probabilities and their gradients: fastpref, the others, and the machine's limit."""

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

if find_spec("fastpref") is None:  # a bare checkout; measured processes inherit the path
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import typer
from check import ERROR_LIMITS, WIDER
from contenders import CONTENDERS, MODES, PASSES
from floor import Floor
from head_shapes import DEFAULT_SHAPES, DTYPES, SHAPES, HeadShape, parse_shapes
from inputs import InputError
from memory import RESULTS, check_output, parse_tokens
from points import CHECK_TOKENS, Job, Point, Row, run, run_floors
from report import describe_run, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from speed_plot import plot_speed
from speed_report import add_floors, better_floors, print_speed
from timing import cache_bytes

DEFAULT_TOKENS = {"cpu": "512,2048,4096", "cuda": "4096,16384"}
POINT_SECONDS = {"cpu": 3.0, "cuda": 0.5}  # for the timing of one point
QUICK_SECONDS = {"cpu": 1.0, "cuda": 0.1}
MINUTES = {"cpu": 11.0, "cuda": 6.5}  # after these no new point begins
# On a CPU of who takes longer than so many times the floor one call is timed, that which measures
# memory: calls of many seconds vary little, and the others shall have the time.
ONE_CALL_BEYOND = {"cpu": 3.0, "cuda": math.inf}

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help=f"Heads to measure: {', '.join(SHAPES)}, or HIDDENxVOCABULARY such as 2048x32000. "
            f"By default {DEFAULT_SHAPES['cpu']} on a CPU and the others on a GPU.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Tokens in a batch, one measurement each. "
            f"By default {DEFAULT_TOKENS['cpu']} on a CPU, {DEFAULT_TOKENS['cuda']} on a GPU.",
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help=f"What to measure, by default everything: {', '.join(CONTENDERS)}.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Where the results go; the plot goes beside them as .png. "
            "By default benchmarks/results/speed-cpu.json or speed-cuda.json.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A first look: the fewest tokens, few repeats."),
    ] = False,
) -> None:
    """Measure how fast log-probabilities and their gradients are computed from hidden states.

    Each way to compute them is checked against a run with full logits in wider numbers, and timed
    only if it is right: forward, backward and both, without gradients, with a frozen and with a
    trained language-model head. Times are also given as multiples of the matrix products that
    nobody can do without, measured in the same run. Prints a table, writes JSON and a plot.

    Takes under eight minutes on one NVIDIA GPU, about twelve on two CPU cores; --quick takes two.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    try:
        heads = parse_shapes(shapes or DEFAULT_SHAPES[device])
        counts = parse_tokens(tokens or DEFAULT_TOKENS[device])
        keys = parse_peers(peers)
        json_path = check_output(output or RESULTS / f"speed-{device}.json")
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if quick:
        counts = counts[:1]
    seconds = (QUICK_SECONDS if quick else POINT_SECONDS)[device]

    started, load = time.time(), os.getloadavg()[0]
    rows, floors, details = measure_all(heads, counts, keys, device, seconds, console)
    report = describe_run() | {
        "device": device,
        "minutes": round((time.time() - started) / 60, 1),
        "load_average_before": round(load, 2),
        "settings": {
            "tokens": counts,
            "dtype": str(DTYPES[device]).removeprefix("torch."),
            "errors_relative_to": str(WIDER[device]).removeprefix("torch."),
            "check_tokens": CHECK_TOKENS[device],
            "wrong_beyond": ERROR_LIMITS[DTYPES[device]],
            "seconds_per_point": seconds,
            "passes_of_the_floor": PASSES,
            "cache_bytes": cache_bytes(device),
        },
        "shapes": {shape.key: shape._asdict() for shape in heads},
        **details,
    }
    write_json(json_path, report, rows)
    print_speed(console, report, rows, floors, heads)
    written = [json_path]
    if find_spec("matplotlib"):
        written.append(json_path.with_suffix(".png"))
        plot_speed(json_path, written[-1])
    console.print("Wrote", " and ".join(map(str, written)), soft_wrap=True)


def parse_peers(text: str | None) -> list[str]:
    """Parse "full,fastpref" into keys of `CONTENDERS`, in its order; all without a text."""
    wanted = set(CONTENDERS) if text is None else {part.strip() for part in text.split(",")}
    if unknown := sorted(wanted - set(CONTENDERS)):
        raise InputError(f"--peers: expected some of {', '.join(CONTENDERS)}; got {unknown[0]!r}")
    return [key for key in CONTENDERS if key in wanted]


def measure_all(
    shapes: list[HeadShape],
    counts: list[int],
    keys: list[str],
    device: str,
    seconds: float,
    console: Console,
) -> tuple[list[Row], list[Floor], dict[str, Any]]:
    """Measure the floors, every contender, and the floors again; rows in the table's order."""
    deadline = time.time() + 60 * MINUTES[device]
    batches = [(shape, tokens) for shape in shapes for tokens in counts]
    rows: list[Row] = []
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, "{task.description}", console=console, transient=True) as progress:
        points = sum(len(batches) * len(CONTENDERS[key].modes) for key in keys)
        task = progress.add_task("torch.mm", total=points + 2)
        before, copy_rate = run_floors(batches, device, seconds)
        progress.advance(task)
        jobs = [
            Job(key, _points(key, batches, before, device), device, seconds, deadline)
            for key in keys
        ]
        for row in _run_all(jobs):
            name = CONTENDERS[row.contender].name
            progress.update(task, description=f"{name}, {row.shape}, {row.mode}", advance=1)
            rows.append(row)
        progress.update(task, description="torch.mm again")
        after, _ = run_floors(batches, device, seconds)
    floors = better_floors(before, after)
    add_floors(rows, floors, shapes)
    order = {shape.key: index for index, shape in enumerate(shapes)}
    rows.sort(key=lambda row: (order[row.shape], row.tokens, MODES.index(row.mode)))
    by_key = {shape.key: shape for shape in shapes}
    details = {
        "copy_bytes_per_second": copy_rate,
        "floors": [
            asdict(floor)
            | {"flops_per_second": floor.flops_per_second(by_key[floor.shape])}
            | {"seconds_before_and_after": [one.seconds, other.seconds]}
            for floor, one, other in zip(floors, before, after, strict=True)
        ],
    }
    return rows, floors, details


def _points(
    key: str, batches: list[tuple[HeadShape, int]], floors: list[Floor], device: str
) -> list[Point]:
    """All points of one contender; modes innermost, as they share their inputs."""
    return [
        Point(*batch, mode, slow=ONE_CALL_BEYOND[device] * PASSES[mode] * floor.seconds)
        for batch, floor in zip(batches, floors, strict=True)
        for mode in CONTENDERS[key].modes
    ]


def _run_all(jobs: list[Job]) -> Iterator[Row]:
    for job in jobs:
        yield from run(job)


if __name__ == "__main__":
    app()
