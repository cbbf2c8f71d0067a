"""What a training came to: a table on the screen, and a plot."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MEASURES = ("loss", "rewards/accuracies", "rewards/margins")
PLOTTED = ("loss", "rewards/accuracies")
OF = {"train": "", "eval": "eval_"}
Points = list[tuple[int, float]]  # of a measure, by step


def logged(history: list[dict[str, Any]]) -> dict[str, Points]:
    """What was logged of the measures, ``eval_loss`` among them."""
    names = [prefix + name for prefix in OF.values() for name in MEASURES]
    found = {name: [(row["step"], row[name]) for row in history if name in row] for name in names}
    return {name: points for name, points in found.items() if points}


def report(history: list[dict[str, Any]], folder: Path) -> None:
    """Print the first and the last number of each measure, and where model and plot are."""
    console = Console(markup=False, highlight=False)
    measures = logged(history)
    table = Table("", "first", "last", "steps")
    for name, points in measures.items():
        (first, start), (last, end) = points[0], points[-1]
        table.add_row(name, f"{start:.4g}", f"{end:.4g}", f"{first} to {last}")
    if measures:
        console.print(table)
    if "loss" not in measures:  # the end of a training logs the rewards of steps that were not
        console.print("no loss was logged: --logging_steps is more than the steps of the training")
    console.print(f"{folder}: the model", soft_wrap=True)
    if measures and find_spec("matplotlib"):
        file = folder / "training.png"
        plot(measures, file)
        console.print(f"{file}: {' and '.join(PLOTTED)} over the steps", soft_wrap=True)


def plot(measures: dict[str, Points], file: Path) -> None:
    """Draw each measure in its own axes, in training and in evaluation."""
    from matplotlib.figure import Figure

    shown = [name for name in PLOTTED if any(prefix + name in measures for prefix in OF.values())]
    figure = Figure(figsize=(5 * len(shown), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for label, prefix in OF.items():
            if points := measures.get(prefix + name):
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set(xlabel="step", title=name)
        if name == "rewards/accuracies":
            axes.set_ylim(-0.05, 1.05)  # a share
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)
