"""The table and the plot of a comparison, made from its JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # the plot is a file: no display is needed
import numpy as np
from frontier import gains_at, interval
from matplotlib import pyplot
from rich.console import Console
from rich.table import Column, Table

GRID = np.linspace(0, 6, 121)  # nats
MARKERS = "osDP^vX*h<>"


def print_report(console: Console, file: Path) -> None:
    """Print what the file has: the gains, and what the signals know."""
    report = json.loads(file.read_text("utf-8"))
    starts = report["starts"]
    kls = list(dict.fromkeys(row["kl"] for row in report["gains"]))
    last = kls[-1]
    against = report["against"]
    table = Table(
        Column("method", no_wrap=True),
        *(f"≤ {kl:g} nats" for kl in kls),
        f"ahead of {against}\n≤ {last:g} nats",
        title=f"True return above the SFT student's: mean of {len(starts)} worlds, 95 % interval",
    )
    for method in dict.fromkeys(row["method"] for row in report["gains"]):
        rows = [row for row in report["gains"] if row["method"] == method]
        cells = [_cell(row["gain"], row["low"], row["high"]) for row in rows]
        ahead = _cell(*(rows[-1][name] for name in ("ahead", "ahead_low", "ahead_high")))
        table.add_row(method, *cells, ahead if method != against else "")
    console.print(table)

    table = Table("signal", "ranks the better response first", title="What the signals know")
    for name in starts[0]["ranking"]:
        shares = np.array([start["ranking"][name] for start in starts])
        low, high = interval(shares)
        table.add_row(name, f"{shares.mean():.1%} [{low:.1%}, {high:.1%}]")
    console.print(table)
    for name, words in (
        ("sft_return", "return of the student after SFT"),
        ("behaviour_return", "return of the behaviour"),
        ("teacher_sft_return", "return of the teacher before DPO"),
        ("teacher_return", "return of the teacher"),
        ("teacher_kl", "KL of the teacher from the one before"),
        ("value_correlation_before_dpo", "logsumexp with the true soft value, before DPO"),
        ("value_correlation", "the same after DPO"),
    ):
        values = ", ".join(f"{start[name]:.2f}" for start in starts)
        console.print(f"{words}, world by world: {values}", highlight=False)
    best = ", ".join(f"{most_gain(start, last):.1f}" for start in starts)
    console.print(f"the most that {last:g} nats buy from the behaviour on: {best}", highlight=False)


def _cell(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f}\n{low:.2f} to {high:.2f}"


def most_gain(start: dict[str, Any], kl: float) -> float:
    """What a policy that knows the world gains above the behaviour, with at most so many nats."""
    kls, returns = np.array(start["best"]).T
    behaviour: float = start["behaviour_return"]
    return float(np.interp(kl, kls, returns)) - behaviour


def plot(file: Path, image: Path) -> None:
    """Mean frontiers, a panel for each group of methods, with the baseline in all of them."""
    report = json.loads(file.read_text("utf-8"))
    groups: dict[str, list[str]] = {}
    for method, options in report["methods"].items():
        groups.setdefault(options["group"], []).append(method)
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(5.4 * len(groups), 6), sharey=True, squeeze=False
    )
    for axis, (group, methods) in zip(axes[0], groups.items(), strict=True):
        _panel(axis, report, [*dict.fromkeys([report["against"], *methods])])
        axis.set_title(group)
        axis.set_xlabel("KL from the SFT student, nats per response")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("true return above the SFT student's")
    figure.suptitle(
        f"Means of {len(report['starts'])} worlds; band: their 95 % interval; "
        "dotted: further than the method was pushed in some world"
    )
    figure.tight_layout()
    figure.savefig(image, dpi=130)
    pyplot.close(figure)


def _panel(axis: Any, report: dict[str, Any], methods: Sequence[str]) -> None:
    for place, method in enumerate(methods):
        points = [_points(report, start, method) for start in report["starts"]]
        curves = np.array(
            [
                gains_at(each, start["sft_return"], GRID)
                for each, start in zip(points, report["starts"], strict=True)
            ]
        )
        mean, (low, high) = curves.mean(0), interval(curves)
        reached = GRID <= min(max(kl for kl, _ in each) for each in points)
        color = "black" if method == report["against"] else f"C{place - 1}"
        marker = {"marker": MARKERS[place], "markevery": (4 * place, 40)}
        axis.plot(GRID[reached], mean[reached], color=color, label=method, **marker)
        axis.plot(GRID[~reached], mean[~reached], color=color, linestyle=":")
        axis.fill_between(GRID, low, high, color=color, alpha=0.12, linewidth=0)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _points(report: dict[str, Any], start: dict[str, Any], method: str) -> list[Any]:
    return [
        (row["kl"], row["true_return"])
        for row in report["rows"]
        if (row["world"], row["method"]) == (start["world"], method)
    ]
