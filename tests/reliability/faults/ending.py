"""End precomputes and trainings at random moments, and hold what they come to to one left alone.

Run by test_ended.py in a process that can fork safely; ``make faults`` ends them more often.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal as signals
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from safetensors.torch import load_file
from tiny_models import rows, tiny_model, tiny_tokenizer
from training import dataset, signal, student, trainer
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from fastpref.integrations.trl import DRDOConfig, DRDOTrainer
from fastpref.teacher import add_kd_cache, add_shaping

TOKENIZER = tiny_tokenizer()
SAVED = ("model.safetensors", "reward_head.safetensors")
BATCHES = 25  # of one pair
Begin = Callable[[], None]


def teacher(begin: Begin) -> Any:
    """A model that takes its time, so that ends come between its batches, too."""
    model = tiny_model(TOKENIZER)
    forward = model.forward

    def slow(*args, **kwargs):
        begin()
        time.sleep(0.01)
        return forward(*args, **kwargs)

    model.forward = slow
    return model


def values(folder: Path, begin: Begin) -> None:
    options = {"batch_size": 1, "per_token": True}
    add_shaping(rows(BATCHES), teacher(begin), TOKENIZER, folder / "out.parquet", **options)


def means(folder: Path, begin: Begin) -> None:
    options = {"student": tiny_model(TOKENIZER, seed=1), "batch_size": 1}
    add_kd_cache(rows(BATCHES), teacher(begin), TOKENIZER, folder / "out.parquet", **options)


def tokens(folder: Path, begin: Begin) -> None:
    options = {"top_k": 3, "batch_size": 1}
    add_kd_cache(rows(BATCHES), teacher(begin), TOKENIZER, folder / "out.parquet", **options)


class Beginning(TrainerCallback):
    def __init__(self, begin: Begin) -> None:
        self.begin = begin

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin()


def training(folder: Path, begin: Begin) -> None:
    """Saves after every step; an unfinished checkpoint is refused by name, and deleted here."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    while True:
        found = trainer(
            DRDOTrainer, DRDOConfig, folder, student(), settings=settings,
            train_dataset=dataset(**signal("reward")), callbacks=[Beginning(begin)],
        )  # fmt: skip
        newest = get_last_checkpoint(str(folder))
        try:
            found.train(resume_from_checkpoint=newest)
            break
        except (OSError, ValueError) as error:
            assert newest is not None and newest in str(error), error
            shutil.rmtree(newest)
    found.save_model()


def progress(folder: Path) -> int:
    """Batches that are done, or steps; all where a dataset is written already."""
    if (folder / "out.parquet").exists():
        return BATCHES
    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint is not None:
        return int(checkpoint.rsplit("-")[-1])
    return len(list(folder.glob("out.parquet.partial/*.safetensors")))


def assert_same_tables(one: Path, other: Path) -> None:
    first, second = (pyarrow.parquet.read_table(folder / "out.parquet") for folder in (one, other))
    assert first.schema.equals(second.schema, check_metadata=True)
    assert first.equals(second)
    assert os.listdir(one) == os.listdir(other) == ["out.parquet"]


def assert_same_models(one: Path, other: Path) -> None:
    for name in SAVED:
        torch.testing.assert_close(load_file(one / name), load_file(other / name))
    assert not list(other.glob("*.unfinished"))


def ends(job: Callable[[Path, Begin], None], folder: Path, count: int, seed: int) -> list[int]:
    """End a job so many times; what was done after each."""
    fork = multiprocessing.get_context("fork")
    chance = random.Random(f"{seed} {job.__name__}")
    compare = assert_same_models if job is training else assert_same_tables
    seconds = fork.Value("d", 0.0)
    whole, ended = folder / "whole", folder / "ended"

    def run(place: Path, delay: float | None) -> int:
        def work() -> None:
            began = []

            def begin() -> None:
                if not began and delay is not None:
                    # Of the system itself: nothing of Python's runs any more, as after SIGKILL.
                    signals.setitimer(signals.ITIMER_REAL, delay)
                began.append(time.monotonic())

            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                job(place, begin)
            if began:
                seconds.value = time.monotonic() - began[0]

        place.mkdir(parents=True, exist_ok=True)
        process = fork.Process(target=work)
        process.start()
        process.join()
        assert process.exitcode in (0, -signals.SIGALRM), process.exitcode
        return process.exitcode

    assert run(whole, None) == 0
    span, done = seconds.value, []
    while len(done) < count:
        if run(ended, chance.uniform(0, span)) == 0:
            compare(whole, ended)
            shutil.rmtree(ended)  # and from the start
        else:
            done.append(progress(ended))
    assert run(ended, None) == 0
    compare(whole, ended)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", nargs="+", default=["values", "means", "tokens", "training"])
    parser.add_argument("--ends", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    datasets.disable_progress_bars()
    for name in args.jobs:
        print(name, *ends(globals()[name], args.folder / name, args.ends, args.seed), flush=True)


if __name__ == "__main__":
    main()
