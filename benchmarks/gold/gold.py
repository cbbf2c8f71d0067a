"""Methods compared where the truth is known: true return over KL, in worlds of random rewards.

python benchmarks/gold/gold.py --quick  # a first look
python benchmarks/gold/gold.py
python benchmarks/gold/gold.py shaping  # and sizes, drdo

Every finished run is written at once: a comparison that was stopped resumes where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from frontier import summarize
from methods import Method
from plot import plot
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from runs import Run, Start, check_settings, files_of_world, finish_world, read_world
from settings import Settings
from shared import describe_run, write_json
from show import tables
from tables import AGAINST, QUICK_SIZES, SIZES, TABLES, TableName

WORLDS, QUICK_WORLDS = 5, 2

HERE = Path(__file__).resolve().parent
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Work(NamedTuple):
    """One world in one size."""

    world: int
    size: str
    settings: Settings
    methods: Mapping[str, Method]
    folder: Path  # of the size

    def files(self) -> list[Path]:
        """What is there when the work is done."""
        return files_of_world(self.world, self.settings, self.methods, self.folder)


@app.command()
def main(
    table: Annotated[TableName, typer.Argument(help="What is compared.")] = "methods",
    worlds: Annotated[
        int | None, typer.Option(min=1, help=f"How many: {WORLDS}, or {QUICK_WORLDS} if quick.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: few methods, and a lesser teacher.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Worlds at a time; by default as many as cores.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where finished runs are kept, one JSON file each.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="The results; the plot goes beside it as .png."),
    ] = None,
) -> None:
    """Train and measure what is missing, then print a table, write JSON and a plot."""
    plan = TABLES[table]
    methods = {name: plan.methods[name] for name in plan.quick} if quick else plan.methods
    folder = folder or HERE / "outputs" / ("quick" if quick else "runs")
    results = folder if quick else HERE / "results"
    sizes = QUICK_SIZES if quick else SIZES
    compare(
        {size: sizes[size] for size in plan.sizes},
        worlds or (QUICK_WORLDS if quick else WORLDS),
        methods,
        plan.kls,
        folder,
        output or results / f"{table}.json",
        jobs=jobs or os.cpu_count() or 1,
    )


def compare(
    sizes: Mapping[str, Settings],
    worlds: int,
    methods: Mapping[str, Method],
    kls: Sequence[float],
    folder: Path,
    output: Path,
    *,
    jobs: int,
) -> None:
    """Everything after the command line."""
    torch.set_num_threads(1)  # as in the processes of the worlds
    console = Console()
    works = []
    for size, settings in sizes.items():
        of_size = folder / re.sub(r"[^a-z0-9]+", "-", size)
        check_settings(of_size, settings)
        works += [Work(world, size, settings, methods, of_size) for world in range(worlds)]
    finish(works, jobs, console)
    starts, runs_of_worlds = zip(*(read_world(work.files()) for work in works), strict=True)
    rows = [run for runs in runs_of_worlds for run in runs]
    report = describe_run() | {
        "sizes": {size: asdict(settings) for size, settings in sizes.items()},
        "methods": {name: asdict(method) for name, method in methods.items()},
        "against": AGAINST,
        "minutes_of_one_core": sum(one.seconds for one in (*starts, *rows)) / 60,
        "starts": [asdict(start) for start in starts],
        "gains": [
            row for size in sizes for row in gains_of_size(size, starts, runs_of_worlds, kls)
        ],
    }
    write_json(output, report, rows)
    found = json.loads(output.read_text("utf-8"))
    print(tables(found))
    plot(found, output.with_suffix(".png"))
    console.print(f"Wrote {output} and {output.with_suffix('.png')}", soft_wrap=True)


def gains_of_size(
    size: str,
    starts: Sequence[Start],
    runs_of_worlds: Sequence[Sequence[Run]],
    kls: Sequence[float],
) -> list[dict[str, Any]]:
    """Every method's gains in one size."""
    worlds = [
        (start.sft_return, runs)
        for start, runs in zip(starts, runs_of_worlds, strict=True)
        if start.size == size
    ]
    points: dict[str, list[list[tuple[float, float]]]] = {}
    for name in dict.fromkeys(run.method for run in worlds[0][1]):
        points[name] = [
            [(run.kl, run.true_return) for run in runs if run.method == name] for _, runs in worlds
        ]
    gains = summarize(points, [start for start, _ in worlds], kls, against=AGAINST)
    return [{"size": size, **asdict(gain)} for gain in gains]


def finish(works: Sequence[Work], jobs: int, console: Console) -> None:
    """Finish the worlds that lack a run, each in a process with one thread; show how far it is."""
    files = [work.files() for work in works]
    missing = [
        work
        for work, each in zip(works, files, strict=True)
        if not all(file.exists() for file in each)
    ]
    if not missing:
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn()
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(min(jobs, len(missing)), context, torch.set_num_threads, (1,)) as pool,
    ):
        task = progress.add_task("", total=sum(map(len, files)))
        waiting = {pool.submit(finish_world, *work) for work in missing}
        while waiting:
            done, waiting = wait(waiting, timeout=1)
            progress.update(task, completed=sum(f.exists() for each in files for f in each))
            for future in done:
                future.result()


if __name__ == "__main__":
    app()
