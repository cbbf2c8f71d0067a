"""Processes that share a precompute write the file of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref.teacher import add_shaping, load_teacher


def test_two_processes_give_the_file_of_one(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())), "utf-8")
    paths = ["--teacher", tmp_path / "teacher", "--dataset", tmp_path / "rows.jsonl"]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", "-m", "fastpref", "values", *paths),
            *("--batch-size", "2", "--output", tmp_path / "two.parquet"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("7 pairs") == 1, run.stdout
    model = load_teacher(str(tmp_path / "teacher"))
    add_shaping(tmp_path / "rows.jsonl", *model, tmp_path / "one.parquet", batch_size=2)
    one, two = (pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert one.equals(two) and one.schema.equals(two.schema, check_metadata=True)
