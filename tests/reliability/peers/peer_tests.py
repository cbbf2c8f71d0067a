"""Run the tests of TRL, Liger and Cut Cross-Entropy against fastpref's functions.

``make peer-tests TRL=<checkout> LIGER=<checkout> CCE=<checkout>``. A checkout's own package is
tested, with fastpref in the place of the functions that an adapter names. Nothing is written into
a checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from peer_tables import markdown
from report import describe_run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PEERS = {"trl": "TRL", "liger": "Liger", "cce": "Cut Cross-Entropy"}


def commit_of(checkout: Path) -> str | None:
    """The commit that is checked out, and its day; None of a folder without its history."""
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%H of %cs"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def run_peer(key: str, checkout: Path, tests: list[str], select: str) -> dict[str, Any]:
    """One peer's tests, in a process of their own; what is reported of them."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        command = [
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "plugin",
            "-W", "ignore", "-o", "log_cli=false", "-q", "--no-header", "--tb=line",
            "--adapter", f"for_{key}", "--outcomes", str(file), "-k", select, *tests,
        ]  # fmt: skip
        paths = [HERE, ROOT, checkout / "src", checkout]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # The plugin says what failed; pytest's exit status says no more.
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        if not file.exists():
            sys.exit(f"{PEERS[key]}: pytest stopped before it had run the tests")
        found = json.loads(file.read_text("utf-8"))
    outcomes = found.pop("outcomes")
    return found | {
        "commit": commit_of(checkout),
        "seconds": round(time.monotonic() - started, 1),
        "groups": groups(outcomes),
        "not_applicable": dict(Counter(one["reason"] for one in outcomes if is_left_out(one))),
        "failures": [one for one in outcomes if one["outcome"] == "failed"],
    }


def is_left_out(outcome: dict[str, str]) -> bool:
    """Whether a test says nothing about fastpref."""
    return outcome["outcome"] == "not applicable"


def groups(outcomes: list[dict[str, str]]) -> dict[str, dict[str, int]]:
    """How many of each outcome, by file, and by class where tests are in classes."""
    counts: dict[str, Counter[str]] = {}
    for one in outcomes:
        group = one["test"].rpartition("::")[0].rpartition("/")[2]
        counts.setdefault(group, Counter())[one["outcome"]] += 1
    return {group: dict(count) for group, count in counts.items()}


def main() -> None:
    """Run what is given, print the tables and write the report; 1 where a failure is not known."""
    parser = argparse.ArgumentParser(description=__doc__)
    for key, name in PEERS.items():
        parser.add_argument(f"--{key}", default="", help=f"a checkout of {name}'s repository")
    parser.add_argument("--select", default="", help="as pytest's -k")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    chosen = parser.parse_args()
    report: dict[str, Any] = describe_run() | {"selected": chosen.select, "peers": {}}
    for key, name in PEERS.items():
        if not getattr(chosen, key):
            print(f"{name}: no checkout given, skipped ({key.upper()}=<checkout>)")
            continue
        checkout = Path(getattr(chosen, key)).resolve()
        paths = [one for one in tests_of(key) if (checkout / one).exists()]
        if not paths:
            sys.exit(f"{name}: {checkout} has none of {', '.join(tests_of(key))}")
        print(f"{name}: {commit_of(checkout) or 'a folder without its history'}", flush=True)
        report["peers"][name] = run_peer(key, checkout, paths, chosen.select)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(markdown(report))
    unknown = [
        one for peer in report["peers"].values()
        for one in (*(f for f in peer["failures"] if not f["explanation"]), *peer["not_collected"])
    ]  # fmt: skip
    sys.exit(bool(unknown))


def tests_of(key: str) -> tuple[str, ...]:
    """The files and folders of tests that an adapter is for."""
    import importlib

    tests: tuple[str, ...] = importlib.import_module(f"for_{key}").TESTS
    return tests


if __name__ == "__main__":
    main()
