"""Kill a precompute again and again: run by test_killed.py in a process that can fork safely."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import datasets
import torch
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref.teacher import add_shaping

KILLS = 10


def precompute(model, tokenizer, output: Path) -> None:
    add_shaping(rows(40), model, tokenizer, output, batch_size=1, per_token=True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    datasets.disable_progress_bars()
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    forward = model.forward

    def slow(*args, **kwargs):
        time.sleep(0.02)
        return forward(*args, **kwargs)

    model.forward = slow
    fork = multiprocessing.get_context("fork")

    def start(name: str) -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=precompute, args=(model, tokenizer, folder / name))
        process.start()
        return process

    began = time.monotonic()
    whole = start("whole.parquet")
    whole.join()
    assert whole.exitcode == 0
    seconds = time.monotonic() - began

    chance = random.Random(0)
    done = []
    for _ in range(KILLS):
        process = start("killed.parquet")
        time.sleep(chance.uniform(0, seconds / 4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        done.append(len(list(folder.glob("killed.parquet.partial/*.safetensors"))))
    last = start("killed.parquet")
    last.join()
    assert last.exitcode == 0
    print(*done)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
