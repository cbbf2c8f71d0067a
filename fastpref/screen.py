"""What the commands print beside their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from fastpref.inspection import Inspection
from fastpref.inspection.verdicts import kind_of, shortly
from fastpref.teacher.model import this_process
from fastpref.teacher.store import FinishedBatches, read_settings


def print_verdicts(found: Inspection) -> None:
    """A table of the shares, and below it the verdicts in sentences."""
    from rich.console import Console
    from rich.table import Table

    table = Table("signal", "chosen first", "length regressed out", "verdict")
    for one in found.measures:
        shares = map(shortly, (one.ranked_first, one.without_length))
        table.add_row(one.name, *shares, kind_of(one))
    console = Console(markup=False, highlight=False)
    console.print(table, *found.verdicts, sep="\n")


def be_quiet() -> None:
    """Keep what libraries say and draw off the screen; errors are raised all the same."""
    import datasets
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def precomputing(output: Path) -> Iterator[Callable[[Any], None]]:
    """Say what was written, that nothing was left to do, or how to go on after Ctrl-C."""
    be_quiet()
    finished = output.exists()

    def report(dataset: Any) -> None:
        if not this_process().is_main_process:
            return
        settings = read_settings(output)
        was = "was finished already, nothing was left to do: " if finished else ""
        columns = ", ".join(settings["columns"])
        typer.echo(f"{output}: {was}{len(dataset)} pairs with {columns}")
        if skipped := settings["skipped_rows"]:
            typer.echo(f"left out {len(skipped)} rows: {', '.join(map(str, skipped))}", err=True)

    try:
        yield report
    except KeyboardInterrupt:
        if this_process().is_main_process:
            done = len(FinishedBatches(output).places())
            advice = "the same command continues from there"
            typer.echo(f"stopped with {done} pairs done: {advice}", err=True)
        raise typer.Exit(130) from None  # as shells count Ctrl-C
