"""Two real processes over gloo have the loss and the gradients of one, to float32 rounding."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_on_two(script, *arguments):
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", HERE / script, *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, HERE.parents[:2])),
            "DS_ACCELERATOR": "cpu",
        },
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_ddp():
    run_on_two("ddp.py")


def test_fsdp2():
    pytest.importorskip("peft")
    run_on_two("fsdp2.py")


def test_tensor_parallel(tmp_path):
    run_on_two("tensor_parallel.py", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3():
    run_on_two("zero3.py")
