"""The plot of a comparison: mean frontiers, made from its JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")  # the plot is a file: no display is needed
import numpy as np
from frontier import gains_at, interval
from matplotlib import pyplot

NATS = 10
GRID = np.linspace(0, NATS, 201)
MARKERS = "osDP^vX*h<>"
ROW = 3  # panels beside one another


class Panel(NamedTuple):
    """Curves with the same axes."""

    title: str
    size: str
    methods: Sequence[str]


def panels(report: dict[str, Any]) -> list[Panel]:
    """One for each size, or where there is one size, for each group of methods."""
    sizes, methods, against = list(report["sizes"]), report["methods"], report["against"]
    if len(sizes) > 1:
        return [Panel(f"teacher and student {size}", size, list(methods)) for size in sizes]
    groups: dict[str, list[str]] = {}
    for name, method in methods.items():
        groups.setdefault(method["group"], [against]).append(name)
    return [Panel(group, sizes[0], list(dict.fromkeys(names))) for group, names in groups.items()]


def plot(report: dict[str, Any], image: Path) -> None:
    """All panels, with the method that all are compared with in every one."""
    every = panels(report)
    columns = min(ROW, len(every))
    lines = -(-len(every) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5.4 * columns, 6 * lines), sharey=True, squeeze=False
    )
    for axis in axes.flat[len(every) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, every, strict=False):
        _draw(axis, report, panel)
        axis.set_title(panel.title)
        axis.set_xlabel("KL from the SFT student, nats per response")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("true return above the SFT student's")
    worlds = len({start["world"] for start in report["starts"]})
    figure.suptitle(
        f"Means of {worlds} worlds; band: their 95 % interval; "
        "dotted: further than the method was pushed in some world"
    )
    figure.tight_layout()
    figure.savefig(image, dpi=100)
    pyplot.close(figure)


def _draw(axis: Any, report: dict[str, Any], panel: Panel) -> None:
    starts = [start for start in report["starts"] if start["size"] == panel.size]
    for place, method in enumerate(panel.methods):
        points = [_points(report, start, method) for start in starts]
        curves = np.array(
            [
                gains_at(each, start["sft_return"], GRID)
                for each, start in zip(points, starts, strict=True)
            ]
        )
        mean, (low, high) = curves.mean(0), interval(curves)
        reached = GRID <= min(max(kl for kl, _ in each) for each in points)
        color = "black" if method == report["against"] else f"C{place - 1}"
        marker = {"marker": MARKERS[place % len(MARKERS)], "markevery": (4 * place % 40, 40)}
        axis.plot(GRID[reached], mean[reached], color=color, label=method, **marker)
        axis.plot(GRID[~reached], mean[~reached], color=color, linestyle=":")
        axis.fill_between(GRID, low, high, color=color, alpha=0.12, linewidth=0)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _points(report: dict[str, Any], start: dict[str, Any], method: str) -> list[Any]:
    wanted = start["size"], start["world"], method
    return [
        (row["kl"], row["true_return"])
        for row in report["rows"]
        if (row["size"], row["world"], row["method"]) == wanted
    ]
