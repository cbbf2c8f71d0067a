"""Two processes under DDP train as one does on the whole batch, and by the page's command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import torch
from pages import commands
from tiny_models import rows
from training import TOKENIZER, assert_same, dataset, signal, student
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples" / "recipes"
(COMMAND,) = commands("docs/recipes.md", "torchrun")
LAUNCHER = ["torchrun", "--nproc_per_node", "2", "-m", "fastpref"]
RUN = """
method: tvkd
precompute_shaping: false
model_name_or_path: student
teacher_model_name_or_path: student
dataset_name: pairs.jsonl
per_device_train_batch_size: 2
num_train_epochs: 1
learning_rate: 1.0e-3
logging_steps: 1
report_to: none
disable_tqdm: true
"""


def test_two_processes_train_as_one(tmp_path):
    """So gradients are synchronised: each process alone sees half of the pairs."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    student().save_pretrained(tmp_path / "student")
    TOKENIZER.save_pretrained(tmp_path / "student")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows(8))), "utf-8")
    dataset(**signal("shaping")).to_parquet(tmp_path / "shaped.parquet")
    (tmp_path / "run.yaml").write_text(RUN, "utf-8")
    command = [str(HERE / "processes.py"), str(tmp_path), *COMMAND[len(LAUNCHER) :]]
    assert COMMAND[: len(LAUNCHER)] == LAUNCHER
    run = subprocess.run(
        [sys.executable, *launcher, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (HERE, *HERE.parents[:2], EXAMPLES))),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "1",
        },
    )
    assert run.returncode == 0, run.stderr[-3000:]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student-tvkd")
    assert not saved.lm_head.weight.equal(student().lm_head.weight)
    # 8 pairs, 2 on each of two processes: one process would have made 4 steps.
    assert re.search(r"loss +│.*│ 1 to 2", run.stdout), run.stdout[-3000:]
    processes.main(tmp_path)
    two, one = (torch.load(tmp_path / f"loop-{count}.pt") for count in (2, 1))
    assert len(two) == 2  # 8 pairs, of which a step of either has 4
    assert_same(two, one)
    for make in ("tvkd", "tvkd_with_lora", "drdo", "tdpo_and_dpkd"):
        for steps in (1, 2):
            logged, parameters = torch.load(tmp_path / f"{make}-{steps}-2.pt")
            expected, others = torch.load(tmp_path / f"{make}-{steps}-1.pt")
            assert_same(logged[:-1], expected[:-1])
            assert parameters.keys() == others.keys()
            torch.testing.assert_close(parameters, others, rtol=1e-4, atol=1e-5)
