"""The picture of `speed.py`: every contender's time as a multiple of its floor."""

import json
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, MODES, PASSES, Mode

# Okabe and Ito's palette, which colour-blind readers can tell apart.
OURS, BASELINE, OTHERS, CEILING = "#0072B2", "#000000", "#666666", "#D55E00"
TICKS = (1, 1.5, 2, 3, 4, 6, 10, 20, 50, 100, 200)
TITLES: dict[Mode, str] = {
    "no-grad": "no gradient",
    "frozen": "frozen head, forward + backward",
    "trained": "trained head, forward + backward",
}


def plot_speed(json_path: Path, image_path: Path) -> None:
    """Draw times from a JSON report, in units of the products that nobody can do without."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    report = json.loads(json_path.read_text())
    shown = {row["contender"] for row in report["rows"] if row["status"] != "missing"}
    names = [key for key in CONTENDERS if key in shown]
    shapes = list(report["shapes"])
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in report["rows"])]
    figure, axes = pyplot.subplots(
        len(shapes),
        len(modes),
        figsize=(2.2 + 3.6 * len(modes), 1.7 + len(shapes) * (0.5 + 0.3 * len(names))),
        sharey=True,
        sharex="row",
        squeeze=False,
        layout="constrained",
    )
    for line, shape in zip(axes, shapes, strict=True):
        for axis, mode in zip(line, modes, strict=True):
            _panel(axis, report, shape, mode, names)
        line[0].set_yticks(range(len(names)), [CONTENDERS[key].name for key in names])
        for label, key in zip(line[0].get_yticklabels(), names, strict=True):
            label.set_color(_colour(key))
            label.set_fontweight("bold" if _colour(key) == OURS else "normal")
        line[0].set_ylim(len(names) - 0.4, -0.6)
        about = report["shapes"][shape]
        line[0].annotate(
            f"{about['name']}: H = {about['hidden_size']:,}, V = {about['vocab_size']:,}",
            xy=(0, 1), xycoords="axes fraction", xytext=(0, 22), textcoords="offset points",
            fontsize=11, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("time / floor (1 is the limit, log scale)")
    machine = report["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
    figure.suptitle(
        "Log-probabilities of labels: time as a multiple of torch.mm's products\n"
        f"{report['settings']['dtype']}, {where}",
        fontsize=12,
    )
    _legend(figure, report)
    figure.savefig(image_path, dpi=150)
    pyplot.close(figure)


def _colour(key: str) -> str:
    if key.startswith("fastpref"):
        return OURS
    return BASELINE if key == "full" else OTHERS


def _marker(report: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A filled circle for the largest batch; hollow shapes for the smaller ones."""
    counts = sorted(report["settings"]["tokens"], reverse=True)
    index = counts.index(tokens)
    return {"marker": "oDs^v"[index % 5], "filled": index == 0}


def _panel(axis: Any, report: dict[str, Any], shape: str, mode: Mode, names: list[str]) -> None:
    axis.axvline(1, color=CEILING, linestyle="--", linewidth=1.5, zorder=1)
    rows = [row for row in report["rows"] if (row["shape"], row["mode"]) == (shape, mode)]
    for y, key in enumerate(names):
        of_key = [row for row in rows if row["contender"] == key]
        done = [row for row in of_key if row["status"] == "ok"]
        colour = _colour(key)
        if done:
            slowest = max(row["floor_ratio"] for row in done)
            axis.plot([1, slowest], [y, y], color=colour, linewidth=1.2, alpha=0.5, zorder=1)
        for row in done:
            style = _marker(report, row["tokens"])
            axis.scatter(
                row["floor_ratio"], y, marker=style["marker"], s=38,
                facecolor=colour if style["filled"] else "white", edgecolor=colour, zorder=2,
            )  # fmt: skip
        if not done:
            what = of_key[0]["status"] if of_key else "–"
            axis.text(1.05, y, what, va="center", fontsize=8, color=OTHERS)
    # Who is ten times slower shall not squeeze the others into one point.
    axis.set_xscale("log")
    ratios = [row["floor_ratio"] or 1 for row in report["rows"] if row["shape"] == shape]
    axis.set_xlim(0.9, 1.15 * max(ratios))
    shown = [tick for tick in TICKS if tick <= max(ratios)]
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.minorticks_off()
    products = "1 product" if PASSES[mode] == 1 else f"{PASSES[mode]} products"
    axis.set_title(f"{TITLES[mode]}: x of {products}", fontsize=9)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, report: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=CEILING, linestyle="--", label="the floor: torch.mm in this run")
    ]
    for tokens in sorted(report["settings"]["tokens"], reverse=True):
        style = _marker(report, tokens)
        handles.append(
            Line2D(
                [], [], linestyle="", marker=style["marker"], color=OTHERS,
                markerfacecolor=OTHERS if style["filled"] else "white", label=f"{tokens:,} tokens",
            )
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
