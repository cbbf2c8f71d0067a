"""The report of peers' tests as Markdown, for the terminal and for the docs."""

from __future__ import annotations

from collections import Counter
from typing import Any

OUTCOMES = ("passed", "failed", "not applicable")


def markdown(report: dict[str, Any]) -> str:
    """Three tables: counts, failures with their explanations, reasons of what says nothing."""
    return "\n\n".join((counts(report), failures(report), reasons(report)))


def counts(report: dict[str, Any]) -> str:
    """A row for each file or class of tests, and a sum for each peer."""
    lines = ["| tests | passed | failed | not applicable |", "|---|---|---|---|"]
    for name, peer in report["peers"].items():
        total: Counter[str] = Counter()
        for count in peer["groups"].values():
            total.update(count)
        lines.append(_row(f"**{name}** at {(peer['commit'] or 'no commit')[:10]}", total))
        lines += [_row(f"`{group}`", count) for group, count in peer["groups"].items()]
    return "\n".join(lines)


def failures(report: dict[str, Any]) -> str:
    """What failed, how often, and why."""
    found: Counter[tuple[str, str]] = Counter()
    for peer in report["peers"].values():
        for one in peer["failures"]:
            said = one["explanation"] or f"not explained: {one['reason']}"
            found[one["test"].rpartition("/")[2], said] += 1
        for one in peer["not_collected"]:
            found[one, "could not be imported"] += 1
    lines = ["| failed | times | why |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{test}` | {n} | {why} |" for (test, why), n in found.items()])


def reasons(report: dict[str, Any]) -> str:
    """Why tests are not applicable."""
    lines = ["| not applicable | tests | why |", "|---|---|---|"]
    for name, peer in report["peers"].items():
        said = {" ".join(why.split()): n for why, n in peer["not_applicable"].items()}
        lines += [f"| {name} | {n} | {why} |" for why, n in said.items()]
    return "\n".join(lines)


def _row(first: str, count: dict[str, int]) -> str:
    return f"| {first} | " + " | ".join(str(count.get(one, 0)) for one in OUTCOMES) + " |"
