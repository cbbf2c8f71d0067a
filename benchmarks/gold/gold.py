"""Methods compared where the truth is known: true return over KL, in worlds of random rewards.

python benchmarks/gold/gold.py --quick  # a first look
python benchmarks/gold/gold.py

Every finished run is written at once: a comparison that was stopped resumes where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
    TimeRemainingColumn,
)
from runs import Run, Start, check_settings, runs_of_world  # noqa: E402
from settings import Budget, Settings  # noqa: E402
from show import plot, print_report  # noqa: E402

AGAINST = "DPO"
KLS = (0.5, 1.0, 2.0, 4.0)  # nats
QUICK = Settings(
    teacher_pairs=5000, sft=Budget(200, 200, 2e-3), teacher=Budget(100, 100, 5e-4), samples=2048
)
QUICK_METHODS = ("DPO", "SimPO", "DCKD", "TVKD, value", "TVKD, implicit reward")
QUICK_WORLDS = 2

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    worlds: Annotated[int, typer.Option(min=1, help="How many worlds.")] = 5,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME;NAME;...", help=f"By default all: {'; '.join(METHODS)}."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two worlds, five methods and a smaller teacher.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where finished runs are kept, one JSON file each.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="The results; the plot goes beside it as .png."),
    ] = None,
) -> None:
    """Train and measure what is missing, then print a table, write JSON and a plot."""
    names = list(QUICK_METHODS if quick else METHODS)
    if methods is not None:
        names = [name.strip() for name in methods.split(";")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise typer.BadParameter(f"no method {unknown[0]!r}; there are {'; '.join(METHODS)}")
    if AGAINST not in names:
        names.append(AGAINST)
    kind = "quick" if quick else "gold"
    folder = folder or HERE / "outputs" / kind
    output = output or (folder if quick else HERE / "results") / f"{kind}.json"
    compare(
        QUICK if quick else Settings(),
        min(worlds, QUICK_WORLDS) if quick else worlds,
        names,
        folder,
        output,
    )


def compare(
    settings: Settings, worlds: int, methods: Sequence[str], folder: Path, output: Path
) -> None:
    """Everything after the command line."""
    torch.set_num_threads(1)  # a second one gains nothing with models so small
    console = Console()
    check_settings(folder, settings)
    starts, runs = finish(settings, worlds, methods, folder, console)
    points = {
        method: [points_of(runs, method, world) for world in range(worlds)] for method in methods
    }
    gains = summarize(points, [start.sft_return for start in starts], KLS, against=AGAINST)
    report = describe_run() | {
        "settings": asdict(settings),
        "methods": {method: asdict(METHODS[method]) for method in methods},
        "against": AGAINST,
        "minutes_of_training": sum(one.seconds for one in (*starts, *runs)) / 60,
        "starts": [asdict(start) for start in starts],
        "gains": [asdict(gain) for gain in gains],
    }
    write_json(output, report, runs)
    print_report(console, output)
    plot(output, output.with_suffix(".png"))
    console.print(f"Wrote {output} and {output.with_suffix('.png')}", soft_wrap=True)


def finish(
    settings: Settings, worlds: int, methods: Sequence[str], folder: Path, console: Console
) -> tuple[list[Start], list[Run]]:
    """Train what is missing, and show how far it is."""
    starts: list[Start] = []
    runs: list[Run] = []
    total = worlds * (1 + sum(len(METHODS[method].strengths) for method in methods))
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        for world in range(worlds):
            progress.update(task, description=f"world {world}: teacher")
            for found in runs_of_world(world, settings, methods, folder):
                if isinstance(found, Run):
                    runs.append(found)
                else:
                    starts.append(found)
                label = f"{found.method} {found.strength:g}" if isinstance(found, Run) else ""
                progress.update(task, advance=1, description=f"world {world}: {label}")
    return starts, runs


def points_of(runs: Sequence[Run], method: str, world: int) -> list[tuple[float, float]]:
    """KL and return of a method's students in a world."""
    of_both = [run for run in runs if (run.method, run.world) == (method, world)]
    return [(run.kl, run.true_return) for run in of_both]


if __name__ == "__main__":
    app()
