"""Precomputes and trainings that end at random moments lose nothing and mix nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parents[1]


def test_ended_and_started_again(tmp_path):
    jobs = ["means", "training"]  # `make faults` has more of both
    run = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "ending.py", tmp_path, "--ends", "2"]
        + ["--jobs", *jobs],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "trainers")])},
    )
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == jobs
    done = [int(word) for line in run.stdout.splitlines() for word in line.split()[1:]]
    assert len(done) == 4 and any(done), "all ends came too early to lose anything"
