"""The tables of a comparison, in Markdown, made from its JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from frontier import interval

Report = dict[str, Any]
STARTS = {
    "sft_return": "return of the student after SFT",
    "behaviour_return": "return of the behaviour",
    "teacher_sft_return": "return of the teacher before DPO",
    "teacher_return": "return of the teacher",
    "teacher_kl": "KL of the teacher from the one before, nats",
    "value_correlation_before_dpo": "correlation of logsumexp and true soft value, before DPO",
    "value_correlation": "the same after DPO",
}


def tables(report: Report) -> str:
    """All tables: the gains in every size, what the signals know, where the worlds start.

    docs/evidence.md has the first two as they are printed; a test holds it to the results.
    """
    parts = []
    for size in report["sizes"]:
        starts = [start for start in report["starts"] if start["size"] == size]
        parts += [
            f"Teacher and student {size}, {len(starts)} worlds: true return above the SFT student's"
            f" with 95 % intervals, and how it ranks pairs",
            gains(report, size),
            f"Teacher and student {size}: share of pairs that a signal ranks as the true rewards",
            signals(starts),
            f"Teacher and student {size}: every world's start",
            _markdown(
                ["", *(f"world {start['world']}" for start in starts)],
                [
                    [words, *(f"{start[name]:.2f}" for start in starts)]
                    for name, words in STARTS.items()
                ],
            ),
        ]
    return "\n\n".join(parts)


def gains(report: Report, size: str) -> str:
    """Every method's gains in one size, the best first."""
    found_of_size = [row for row in report["gains"] if row["size"] == size]
    kls = list(dict.fromkeys(row["kl"] for row in found_of_size))
    ahead_at = kls[-2]  # further on, some methods have no student
    header = [
        "method",
        *(f"≤ {kl:g} nats" for kl in kls),
        f"ahead of {report['against']}, ≤ {ahead_at:g}",
        "margin accuracy",
        "by reward head",
    ]
    rows = []
    best_first = sorted(found_of_size, key=lambda row: -row["gain"])
    for method in [row["method"] for row in best_first if row["kl"] == ahead_at]:
        found = {row["kl"]: row for row in found_of_size if row["method"] == method}
        ahead = [found[ahead_at][name] for name in ("ahead", "ahead_low", "ahead_high")]
        runs = [row for row in report["rows"] if (row["size"], row["method"]) == (size, method)]
        rows.append(
            [
                method,
                *(_with_interval(row["gain"], row["low"], row["high"]) for row in found.values()),
                "" if method == report["against"] else _with_interval(*ahead),
                *(_accuracy(runs, name, ahead_at) for name in ("margin", "reward")),
            ]
        )
    return _markdown(header, rows)


def _accuracy(runs: Sequence[dict[str, Any]], name: str, kl: float) -> str:
    """Mean over worlds, of the student that earns the most for at most so many nats."""
    best: dict[int, dict[str, Any]] = {}
    for run in runs:
        known = best.get(run["world"])
        if run["kl"] <= kl and (known is None or run["true_return"] > known["true_return"]):
            best[run["world"]] = run
    found = [run[f"{name}_accuracy"] for run in best.values()]
    return f"{np.mean(found):.1%}" if found and None not in found else ""


def signals(starts: Sequence[dict[str, Any]]) -> str:
    """How often each signal ranks the better response first."""
    rows = []
    for name in starts[0]["ranking"]:
        shares = np.array([start["ranking"][name] for start in starts])
        low, high = interval(shares)
        rows.append([name, f"{shares.mean():.1%} [{low:.1%}, {high:.1%}]"])
    return _markdown(["signal", "ranks the better response first"], rows)


def _with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns that no row has anything in."""
    kept = [place for place in range(len(header)) if any(row[place] for row in rows)]
    lines = [[line[place] for place in kept] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(kept))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
