"""Methods compared where the truth is known: true return over KL, in worlds of random rewards.

python benchmarks/gold/gold.py --quick  # a first look
python benchmarks/gold/gold.py

Every finished run is written at once: a comparison that was stopped resumes where it was.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # of report.py, which the benchmarks share

import torch  # noqa: E402
import typer  # noqa: E402
from frontier import summarize  # noqa: E402
from methods import METHODS  # noqa: E402
from report import describe_run, write_json  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from runs import check_settings, files_of_world, finish_world, read_world  # noqa: E402
from settings import Budget, Settings  # noqa: E402
from show import plot, print_report  # noqa: E402

AGAINST = "DPO"
KLS = (0.5, 1.0, 2.0, 4.0)  # nats, of the table
QUICK_SETTINGS = Settings(
    teacher_pairs=5000, sft=Budget(100, 100, 3e-3), teacher=Budget(50, 100, 5e-4)
)
QUICK_METHODS = ("DPO", "SimPO", "DCKD", "TVKD, value", "TVKD, implicit reward")
QUICK_WORLDS = 2

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    worlds: Annotated[int | None, typer.Option(min=1, help="How many: 5, or 2 if quick.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="'NAME; NAME; ...'",
            help=f"By default all of them: {'; '.join(METHODS)}. {AGAINST} is always there.",
        ),
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
    kind = "quick" if quick else "gold"
    folder = folder or HERE / "outputs" / kind
    compare(
        QUICK_SETTINGS if quick else Settings(),
        worlds or (QUICK_WORLDS if quick else 5),
        parse_methods(methods) if methods else QUICK_METHODS if quick else tuple(METHODS),
        folder,
        output or (folder if quick else HERE / "results") / f"{kind}.json",
        jobs=jobs or os.cpu_count() or 1,
    )


def parse_methods(text: str) -> list[str]:
    """The names of methods, without doubles and with the one that all are compared with."""
    names = [name.strip() for name in text.split(";")]
    for name in names:
        if name not in METHODS:
            raise typer.BadParameter(f"no method {name!r}; there are: {'; '.join(METHODS)}")
    return list(dict.fromkeys([AGAINST, *names]))


def compare(
    settings: Settings,
    worlds: int,
    methods: Sequence[str],
    folder: Path,
    output: Path,
    *,
    jobs: int,
) -> None:
    """Everything after the command line."""
    torch.set_num_threads(1)  # as in the processes of the worlds
    console = Console()
    check_settings(folder, settings)
    files = [files_of_world(world, settings, methods, folder) for world in range(worlds)]
    finish_worlds(settings, methods, folder, files, jobs, console)
    starts, runs_of_worlds = zip(*map(read_world, files), strict=True)
    points = {
        method: [
            [(run.kl, run.true_return) for run in runs if run.method == method]
            for runs in runs_of_worlds
        ]
        for method in methods
    }
    gains = summarize(points, [start.sft_return for start in starts], KLS, against=AGAINST)
    rows = [run for runs in runs_of_worlds for run in runs]
    report = describe_run() | {
        "settings": asdict(settings),
        "methods": {method: asdict(METHODS[method]) for method in methods},
        "against": AGAINST,
        "minutes_of_one_core": sum(one.seconds for one in (*starts, *rows)) / 60,
        "starts": [asdict(start) for start in starts],
        "gains": [asdict(gain) for gain in gains],
    }
    write_json(output, report, rows)
    print_report(console, output)
    plot(output, output.with_suffix(".png"))
    console.print(f"Wrote {output} and {output.with_suffix('.png')}", soft_wrap=True)


def finish_worlds(
    settings: Settings,
    methods: Sequence[str],
    folder: Path,
    files: Sequence[Sequence[Path]],  # of each world
    jobs: int,
    console: Console,
) -> None:
    """Finish the worlds that lack a run, each in a process with one thread; show how far it is."""
    missing = [world for world, each in enumerate(files) if not all(f.exists() for f in each)]
    if not missing:
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn()
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(min(jobs, len(missing)), context, torch.set_num_threads, (1,)) as pool,
    ):
        task = progress.add_task("", total=sum(map(len, files)))
        waiting = {pool.submit(finish_world, world, settings, methods, folder) for world in missing}
        while waiting:
            done, waiting = wait(waiting, timeout=1)
            progress.update(task, completed=sum(f.exists() for each in files for f in each))
            for future in done:
                future.result()


if __name__ == "__main__":
    app()
