"""The table and the plot of the study of values, made from its JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # the plot is a file: no display is needed
import numpy as np
from frontier import Numbers, interval
from matplotlib import pyplot
from rich import box
from rich.console import Console
from rich.table import Column, Table

TABLES = {  # by title: what a table calls a number, how it is written, if with its interval
    "Correlation of logsumexp": {
        "behaviour_correlation": ("behaviour's V", "{:.2f}", True),
        "dpo_correlation": ("DPO's V", "{:.2f}", True),
        "confidence_correlation": ("-entropy", "{:.2f}", True),
        "readable": ("V by regression", "{:.2f}", True),
    },
    "Share of pairs that it ranks as the true rewards do": {
        "bootstrap_ranking": ("V(s_T) - V(s_0)", "{:.1%}", True),
        "next_value_ranking": ("sum of next values", "{:.1%}", True),
    },
    "What it varies by, and how good the teacher is": {
        "std": ("std", "{:.3f}", False),
        "of_state": ("of state", "{:.0%}", False),
        "of_token": ("of token", "{:.0%}", False),
        "true_return": ("return", "{:.2f}", True),
        "kl": ("KL from SFT", "{:.2f}", False),
    },
}
NUMBERS = [key for columns in TABLES.values() for key in columns]
READERS = {"states": "sees the state", "tokens": "reads tokens"}


def print_report(console: Console, file: Path) -> None:
    """Print means over worlds with their intervals, for each kind of reader."""
    report = json.loads(file.read_text("utf-8"))
    for reads, studies in _by_reader(report).items():
        teachers = _teachers(studies)
        teachers["true values"] = {
            key: np.array([study["exact"][key] for study in studies]) for key in studies[0]["exact"]
        }
        for title, columns in TABLES.items():
            table = Table(
                Column("teacher", no_wrap=True),
                *(column for column, _, _ in columns.values()),
                title=f"{title}\n(teacher {READERS[reads]}; {len(studies)} worlds, 95 % interval)",
                box=box.SIMPLE,
            )
            for name, numbers in teachers.items():
                cells = [
                    _cell(numbers[key], form, with_interval) if key in numbers else ""
                    for key, (_, form, with_interval) in columns.items()
                ]
                table.add_row(name, *cells)
            console.print(table)
    for key, words in (("behaviour_return", "the behaviour"), ("uniform_return", "uniform tokens")):
        values = ", ".join(f"{study[key]:.2f}" for study in studies)
        console.print(f"return of {words}, world by world: {values}", highlight=False)


def _by_reader(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault(row["reads"], []).append(row)
    return found


def _teachers(studies: list[dict[str, Any]]) -> dict[str, dict[str, Numbers]]:
    """Numbers of worlds (worlds,) by teacher and by name."""
    found = {}
    for same in zip(*(study["teachers"] for study in studies), strict=True):
        rows = [teacher["judged"] | teacher for teacher in same]
        found[same[0]["name"]] = {key: np.array([row[key] for row in rows]) for key in NUMBERS}
    return found


def _cell(values: Numbers, form: str, with_interval: bool) -> str:
    mean = form.format(values.mean())
    if not with_interval:
        return mean
    low, high = interval(values)
    return f"{mean}\n{form.format(low)} to {form.format(high)}"


def plot(file: Path, image: Path) -> None:
    """Correlations of every teacher with both true values: worlds, their mean and interval."""
    report = json.loads(file.read_text("utf-8"))
    panels = {reads: _teachers(studies) for reads, studies in _by_reader(report).items()}
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(8, 1.8 + 0.42 * sum(map(len, panels.values()))),
        sharex=True,
        squeeze=False,
        height_ratios=[len(each) for each in panels.values()],
    )
    for axis, (reads, teachers) in zip(axes[:, 0], panels.items(), strict=True):
        for place, (key, label, color, marker) in enumerate(
            (
                ("behaviour_correlation", "logsumexp with the behaviour's V", "#0072B2", "o"),
                ("dpo_correlation", "logsumexp with the V of DPO's optimum", "#D55E00", "s"),
                (
                    "readable",
                    "the behaviour's V, read from hidden states by regression",
                    "0.5",
                    "|",
                ),
            )
        ):
            heights = np.arange(len(teachers)) + 0.22 * (place - 1)
            values = np.array([numbers[key] for numbers in teachers.values()]).T
            low, high = interval(values)
            style = {"color": color, "marker": marker, "linestyle": "none"}
            axis.plot(values.mean(0), heights, label=label, **style)
            axis.plot(values.T, heights, alpha=0.35, markersize=3, **style)
            axis.hlines(heights, low, high, color=color)
        axis.set_yticks(range(len(teachers)), list(teachers))
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"a teacher that {READERS[reads]}", fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("correlation with the true soft value at the same position")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", fontsize=8)
    figure.suptitle("Worlds (small marks), their mean and 95 % interval", fontsize=10)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(image, dpi=130)
    pyplot.close(figure)
