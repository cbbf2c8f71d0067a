"""Full disks, folders that cannot be written to, and two runs at once."""

from __future__ import annotations

import os
import resource
import threading
from contextlib import contextmanager, redirect_stderr

import pytest
import torch
from filelock import FileLock
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref.files import load_tensors
from fastpref.models.reward_head import FILE, saved_beside
from fastpref.teacher import add_kd_cache, add_shaping
from fastpref.teacher.precompute import check_run

TOKENIZER = tiny_tokenizer()


@contextmanager
def room_for(size: int):
    """Files of at most so many bytes: what is longer fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Progress bars are drawn elsewhere: pytest keeps what they draw in a file, too.
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "name"),
    [(100, "settings.json"), (1500, "batch-000000.safetensors"), (9000, "out.parquet")],
)
def test_a_full_disk(tmp_path, size, name):
    """The file is named, nothing of it stays, and with more room the run goes on."""
    model, output = tiny_model(TOKENIZER), tmp_path / "out.parquet"
    options = {"student": tiny_model(TOKENIZER, seed=1), "batch_size": 2}
    whole = add_kd_cache(rows(4), model, TOKENIZER, tmp_path / "whole.parquet", **options)
    with room_for(size), pytest.raises(OSError, match=f"{name}: could not be written .*large"):
        add_kd_cache(rows(4), model, TOKENIZER, output, **options)
    assert not output.exists() and not list(tmp_path.rglob("*.tmp"))
    assert add_kd_cache(rows(4), model, TOKENIZER, output, **options).to_list() == whole.to_list()
    assert sorted(os.listdir(tmp_path)) == ["out.parquet", "whole.parquet"]


def test_a_full_disk_leaves_the_older_reward_head(tmp_path):
    with saved_beside({"weight": torch.zeros(1, 16)}, tmp_path):
        pass
    larger = saved_beside({"weight": torch.ones(1, 999)}, tmp_path)
    with room_for(1000), pytest.raises(OSError, match="could not be written"), larger:
        raise AssertionError("no model is written without its head")
    assert os.listdir(tmp_path) == [FILE] and not load_tensors(tmp_path / FILE)["weight"].any()


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """It is refused before a model is loaded."""
    (tmp_path / "locked").mkdir(mode=0o555)
    output = tmp_path / "locked" / "deeper" / "out.parquet"
    if os.access(tmp_path / "locked", os.W_OK):  # by root, who may write everywhere
        monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path / "locked")
    with pytest.raises(ValueError, match=f"output: .*can be written to, got '{output}'"):
        check_run(output, None, 1)
    check_run(tmp_path / "new" / "out.parquet", None, 1)


def test_a_second_run_is_refused(tmp_path, monkeypatch):
    model, output = tiny_model(TOKENIZER), tmp_path / "out.parquet"
    forward, reached, go_on = model.forward, threading.Event(), threading.Event()

    def waiting(**inputs):
        reached.set()
        assert go_on.wait(60)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", waiting)
    first = threading.Thread(target=add_shaping, args=(rows(2), model, TOKENIZER, output))
    first.start()
    assert reached.wait(60)
    try:
        with pytest.raises(ValueError, match=r"output: expected .*out\.parquet for one run at a"):
            add_shaping(rows(2), tiny_model(TOKENIZER), TOKENIZER, output)
    finally:
        go_on.set()
        first.join()
    assert os.listdir(tmp_path) == ["out.parquet"]
    add_shaping(rows(2), tiny_model(TOKENIZER), TOKENIZER, output)  # and is let in afterwards


def test_what_another_run_has_just_written_is_taken(tmp_path, monkeypatch):
    """Finished by another after this one had looked, and before it could begin."""
    output = tmp_path / "out.parquet"
    whole = add_shaping(rows(2), tiny_model(TOKENIZER), TOKENIZER, output)
    output.rename(tmp_path / "there")
    acquire = FileLock.acquire

    def late(self, *arguments, **options):
        if not output.exists():
            (tmp_path / "there").rename(output)
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(FileLock, "acquire", late)
    model = tiny_model(TOKENIZER)
    model.forward = None
    assert add_shaping(rows(2), model, TOKENIZER, output).to_list() == whole.to_list()
    assert os.listdir(tmp_path) == ["out.parquet"]
