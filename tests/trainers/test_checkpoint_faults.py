"""Checkpoints under clocks that are set back, and with files that somebody else has put there."""

from __future__ import annotations

import os
import pickle
import time

import pytest
from training import dataset, signal, student, trainer

from fastpref.integrations.trl import DRDOConfig, DRDOTrainer

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}


def drdo(folder, **settings):
    return trainer(
        DRDOTrainer, DRDOConfig, folder, student(), settings=SETTINGS | settings,
        train_dataset=dataset(**signal("reward")),
    )  # fmt: skip


def test_a_clock_that_goes_back(tmp_path):
    """Of checkpoints the newest are kept, whatever their times say."""
    found = drdo(tmp_path, save_total_limit=2, per_device_train_batch_size=1)
    save = found._save_checkpoint

    def back(model, trial):
        save(model, trial)
        for folder in tmp_path.glob("checkpoint-*"):  # as though it had been later until now
            later = time.time() + 3600 - int(folder.name.split("-")[1])
            os.utime(folder, (later, later))

    found._save_checkpoint = back
    found.train()
    kept = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-8"]


class Malicious:
    """What runs when it is unpickled."""

    def __init__(self, traces):
        self.traces = traces

    def __reduce__(self):
        return os.mkdir, (str(self.traces),)


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    drdo(tmp_path).train()
    resumed, traces = drdo(tmp_path), tmp_path / "traces"
    for name in ("scheduler.pt", "optimizer.pt", "rng_state.pth"):
        file = tmp_path / "checkpoint-2" / name
        contents = file.read_bytes()
        file.write_bytes(pickle.dumps(Malicious(traces), protocol=2))
        with pytest.raises(pickle.UnpicklingError):
            resumed.train(resume_from_checkpoint=str(file.parent))
        assert not traces.exists()
        pickle.loads(file.read_bytes())
        traces.rmdir()  # it would have made it
        file.write_bytes(contents)
