"""How a comparison is summed up, shown and plotted."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("fastpref", "torch", "transformers", "trl", "datasets")
MEASURES = {
    "implicit_accuracy": "accuracy",
    "implicit_margin": "margin, nats",
    "mean_logp_accuracy": "accuracy of log-probabilities",
    "head_accuracy": "accuracy of the reward head",
}
PARTS = {"held_out": "held out", "train": "trained on"}


def describe_run() -> dict[str, Any]:
    """Hardware, versions and commit; no names of hosts or folders."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, of every measure and method."""
    methods = dict.fromkeys(run["method"] for run in runs)
    return {
        method: {part: _spread([r[part] for r in runs if r["method"] == method]) for part in PARTS}
        for method in methods
    }


def _spread(measures: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name in measures[0]:
        values = [each[name] for each in measures]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = {"mean": statistics.mean(values), "deviation": deviation}
    return found


def standard_error(pairs: int) -> float:
    """Of an accuracy that is a coin's."""
    return math.sqrt(0.25 / pairs)


def show(report: dict[str, Any]) -> None:
    """Print the summary."""
    console = Console()
    for part, title in PARTS.items():
        pairs = report["pairs"][part]
        error = f"binomial standard error of an accuracy: {standard_error(pairs):.1%}"
        table = Table("method", *MEASURES.values(), title=f"{pairs} pairs {title}; {error}")
        for method, parts in report["summary"].items():
            table.add_row(method, *(_cell(parts[part].get(name), name) for name in MEASURES))
        console.print(table)
    for name, parts in report["signals"].items():
        shares = (f"{parts[part]['accuracy']:.1%} of the pairs {PARTS[part]}" for part in PARTS)
        console.print(f"{name} is higher for the chosen response in {' and '.join(shares)}")


def _cell(found: dict[str, float] | None, name: str) -> str:
    if found is None:
        return ""
    form = ".1%" if name.endswith("accuracy") else ".2f"
    return f"{found['mean']:{form}} ± {found['deviation']:{form}}"


def plot(report: dict[str, Any], file: Path) -> None:
    """Accuracy and margin: a dot a seed, a bar the mean."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    methods = list(report["summary"])
    for axis, (name, label) in zip(axes, list(MEASURES.items())[:2], strict=True):
        for offset, (part, title) in zip((-0.2, 0.2), PARTS.items(), strict=True):
            places = [place + offset for place in range(len(methods))]
            means = [report["summary"][method][part][name]["mean"] for method in methods]
            bars = axis.bar(places, means, width=0.36, alpha=0.5, label=title)
            for place, method, bar in zip(places, methods, bars, strict=True):
                dots = [run[part][name] for run in report["runs"] if run["method"] == method]
                axis.plot([place] * len(dots), dots, "o", color=bar.get_facecolor()[:3], ms=5)
        axis.set_xticks(range(len(methods)), methods)
        axis.set_title(label)
    error = standard_error(report["pairs"]["held_out"])
    axes[0].axhspan(0.5 - error, 0.5 + error, color="grey", alpha=0.3, label="a coin, ± 1 s.e.")
    axes[1].axhline(0, color="grey", linewidth=0.8)
    axes[0].legend()
    figure.suptitle("What the student added to log π, chosen against rejected; a dot a seed")
    figure.savefig(file, dpi=130)
    plt.close(figure)
