"""Two processes under DDP train as one does on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import processes
import torch
from training import assert_same

HERE = Path(__file__).parent


def test_two_processes_train_as_one(tmp_path):
    """So gradients are synchronised: each process alone sees half of the pairs."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run(
        [sys.executable, *launcher, str(HERE / "processes.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "1",
        },
    )
    assert run.returncode == 0, run.stderr[-3000:]
    processes.main(tmp_path)
    for make in ("tvkd", "tvkd_with_lora", "drdo", "tdpo_and_dpkd"):
        for steps in (1, 2):
            logged, parameters = torch.load(tmp_path / f"{make}-{steps}-2.pt")
            expected, others = torch.load(tmp_path / f"{make}-{steps}-1.pt")
            assert_same(logged[:-1], expected[:-1])
            assert parameters.keys() == others.keys()
            torch.testing.assert_close(parameters, others, rtol=1e-4, atol=1e-5)
