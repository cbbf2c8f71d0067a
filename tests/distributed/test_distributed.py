"""Two real processes over gloo have the loss and the gradients of one, to float32 rounding."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks

HERE = Path(__file__).parent


def run_on_two(folder, *scripts):
    """One script after another, in the same two processes: most of the time is their imports."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", HERE / "scripts.py", *scripts),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, HERE.parents[:2])),
            "DS_ACCELERATOR": "cpu",
            "TMPDIR": str(folder),  # where both look for what one has written
        },
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line for line in run.stdout.splitlines() if line in scripts] == list(scripts)


def test_ddp_fsdp2_and_tensor_parallel(tmp_path):
    pytest.importorskip("peft")
    assert blocks("docs/distributed.md")  # which page.py executes
    run_on_two(tmp_path, "ddp.py", "fsdp2.py", "tensor_parallel.py", "page.py")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3(tmp_path):
    run_on_two(tmp_path, "zero3.py")
