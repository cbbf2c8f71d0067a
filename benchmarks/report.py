"""How a benchmark's rows are shown and kept: a table, a JSON file, a plot."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from contenders import PASSES, Mode
from measure import Measurement
from peers import BASELINE
from rich import box
from rich.console import Console
from rich.table import Table

MEGABYTE = 1e6
PACKAGES = (
    "fastpref",
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
)
# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ too.
STYLES: dict[str, dict[str, Any]] = {
    BASELINE: {"color": "#000000", "marker": "o"},
    "torch linear_cross_entropy": {"color": "#E69F00", "marker": "s"},
    "TRL ChunkedLogProb": {"color": "#009E73", "marker": "D"},
    "Liger scaled cross-entropy": {"color": "#D55E00", "marker": "P"},
    "Liger fused DPO": {"color": "#CC79A7", "marker": "v"},
    "fastpref": {"color": "#0072B2", "marker": "o", "linewidth": 2.8, "markersize": 7},
    "fastpref, scratch_bytes=0": {"color": "#56B4E9", "marker": "^", "linestyle": "--"},
}


def describe_run() -> dict[str, Any]:
    """Hardware, versions and commit of this run; no host names and no paths."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, report: dict[str, Any], rows: Iterable[Any]) -> None:
    """Write everything that the table and the plot show; rows are dataclasses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = report | {"rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def print_report(console: Console, report: dict[str, Any], rows: list[Measurement]) -> None:
    """Print the table and, below it, what is missing or failed and why."""
    console.print(table(rows))
    reasons = {f"{row.peer} {row.status}: {row.reason}": None for row in rows if row.reason}
    missing = {f"{name} missing: {why}": None for name, why in report["missing_models"].items()}
    for note in reasons | missing:
        console.print(note, style="red", markup=False)
    console.print("Peak extra memory: beyond inputs and returned gradients; 1 MB = 1e6 bytes.")
    console.print(
        "x floor: time as a multiple of the matrix products that nobody can do without\n"
        "(frozen head 2, trained 3), by torch.mm in this run."
    )
    console.print("Errors of the gradients: relative to a float64 run. More: benchmarks/README.md")


def table(rows: list[Measurement]) -> Table:
    """Make one table: a section for each model, token count and kind of head."""
    result = Table(
        title="TVKD loss, one forward and backward",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("peer", no_wrap=True)
    for name in (
        "extra\npeak MB",
        "vs full\nlogits",
        "time\ns",
        "x\nfloor",
        "error\nhidden",
        "error\nweight",
    ):
        result.add_column(name, justify="right", no_wrap=True)
    for model, of_model in groupby(rows, lambda row: row.model):
        result.add_row(f"[bold]{model}")
        for (tokens, head), of_section in groupby(of_model, lambda row: (row.tokens, row.head)):
            section = list(of_section)
            full = next((row for row in section if row.peer == BASELINE), None)
            result.add_row(f"[bold]{tokens} tokens, {head} head")
            for row in section:
                result.add_row(f"  {row.peer}", *_cells(row, full))
            result.add_section()
    return result


def _cells(row: Measurement, full: Measurement | None) -> list[str]:
    if row.peak_extra_bytes is None or row.seconds is None:
        return [f"[red]{row.status}"]
    return [
        f"{row.peak_extra_bytes / MEGABYTE:.0f}",
        _ratio(row.peak_extra_bytes, full.peak_extra_bytes if full else None),
        f"{row.seconds:.2f}" if row.seconds >= 0.1 else f"{row.seconds:.4f}",
        "–" if row.floor_ratio is None else f"{row.floor_ratio:.2f}",
        *(
            "–" if error is None else f"{error:.0e}"
            for error in (row.hidden_grad_error, row.weight_grad_error)
        ),
    ]


def _ratio(value: float | None, full: float | None) -> str:
    return f"{value / full:.2f}x" if value is not None and full else "–"


def plot(json_path: Path, image_path: Path) -> None:
    """Draw peak extra memory and time against token count from a JSON report."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    report = json.loads(json_path.read_text())
    rows = [row for row in report["rows"] if row["status"] == "ok"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = pyplot.figure(figsize=(9, 6.6 * len(models)), layout="constrained")
    for part, model in zip(figure.subfigures(len(models), squeeze=False).flat, models, strict=True):
        _plot_model(part, model, [row for row in rows if row["model"] == model], report)
    figure.savefig(image_path, dpi=150)
    pyplot.close(figure)


def _plot_model(
    figure: Any, model: str, rows: list[dict[str, Any]], report: dict[str, Any]
) -> None:
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    modes: tuple[Mode, ...] = ("frozen", "trained")
    for column, head in enumerate(modes):
        of_head = [row for row in rows if row["head"] == head]
        for peer, style in STYLES.items():
            of_peer = [row for row in of_head if row["peer"] == peer]
            if not of_peer:
                continue
            x = [row["tokens"] for row in of_peer]
            memory = [row["peak_extra_bytes"] / MEGABYTE for row in of_peer]
            options = {"linewidth": 1.6, "markersize": 5, "label": peer} | style
            axes[0, column].plot(x, memory, **options)
            axes[1, column].plot(x, [row["floor_ratio"] for row in of_peer], **options)
        axes[0, column].set_title(f"{head} head", fontsize=11)
        axes[1, column].axhline(1, color="#666666", linestyle=":", linewidth=1.2)
        axes[1, column].set_title(f"floor: {PASSES[head]} products by torch.mm", fontsize=9)
        axes[1, column].set_xlabel("response tokens in the batch, N")
    axes[0, 0].set_ylabel("peak extra memory, MB (log scale)")
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_formatter("{x:.0f}")
    axes[1, 0].set_ylabel("forward + backward, x of its floor")
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 0].set_xlim(left=0)
    axes[1, 0].set_xticks([0, *sorted({row["tokens"] for row in rows})])
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
    shape, dtype = report["heads"][model]["weight"], report["heads"][model]["dtype"]
    figure.suptitle(
        f"TVKD loss, {model}: V = {shape[0]:,}, H = {shape[1]:,}, {dtype}\n{where}", fontsize=12
    )
    lines, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
