"""A file that was cut off or that lost bits is refused by its name, or reads as it was written."""

from __future__ import annotations

import json
import os
import random
import shutil

import datasets
import pyarrow.parquet
import pytest
import torch
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref.data import read_rows
from fastpref.files import load_tensors, tensors_as_bytes
from fastpref.models.reward_head import (
    FILE,
    UNFINISHED,
    add_reward_head,
    folder_has_reward_head,
    load_reward_head,
    saved_beside,
)
from fastpref.teacher import add_kd_cache, add_shaping, load_shaping, load_teacher

TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def _copies_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "copies"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of `add_shaping`."""
    output = tmp_path_factory.mktemp("written") / "out.parquet"
    add_shaping(rows(2), tiny_model(TOKENIZER), TOKENIZER, output)
    return output


def damages(contents: bytes, seed: int, count: int):
    """Files with one bit of another value, and files that end too soon."""
    chance = random.Random(seed)
    for _ in range(count):
        place = chance.randrange(len(contents))
        flipped = bytes([contents[place] ^ 1 << chance.randrange(8)])
        yield contents[:place] + flipped + contents[place + 1 :]
    for _ in range(count // 3):
        yield contents[: chance.randrange(len(contents))]


def test_a_damaged_dataset(written, tmp_path):
    whole, output = load_shaping(written).to_list(), tmp_path / "out.parquet"
    refused = 0
    for contents in damages(written.read_bytes(), 0, 60):
        output.write_bytes(contents)
        try:
            found = load_shaping(output)
        except ValueError as error:
            assert str(output) in str(error)
            refused += 1
        else:
            assert found.to_list() == whole
    assert refused > 70  # of 80


def test_an_output_that_is_damaged_is_not_gone_on_with(written, tmp_path):
    output = tmp_path / "out.parquet"
    contents = bytearray(written.read_bytes())
    contents[len(contents) // 4] ^= 1
    output.write_bytes(contents)
    with pytest.raises(ValueError, match=r"out\.parquet: expected the bytes that were written"):
        add_shaping(rows(2), tiny_model(TOKENIZER), TOKENIZER, output)
    assert output.read_bytes() == contents


def test_damaged_tensors(tmp_path):
    tensors = {"a": torch.randn(7, 3), "counts": torch.arange(5, dtype=torch.int32)}
    contents, file = tensors_as_bytes(tensors), tmp_path / "batch.safetensors"
    refused = 0
    for damaged in damages(contents, 1, 90):
        file.write_bytes(damaged)
        try:
            found = load_tensors(file)
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
        else:  # where the name of the digest was hit
            torch.testing.assert_close(found, tensors, rtol=0, atol=0)
    assert refused > 105  # of 120


@pytest.mark.parametrize("how", ["cut off", "flipped", "settings"])
def test_damaged_batches(tmp_path, monkeypatch, how):
    """They are named, and what is whole is not computed again."""
    model, options = tiny_model(TOKENIZER), {"top_k": 2, "batch_size": 1}
    whole = add_kd_cache(rows(4), model, TOKENIZER, tmp_path / "whole.parquet", **options)
    output = tmp_path / "out.parquet"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fastpref.teacher.precompute._write", stop)
        add_kd_cache(rows(4), model, TOKENIZER, output, **options)
    name = "settings.json" if how == "settings" else "batch-000002.safetensors"
    file = tmp_path / "out.parquet.partial" / name
    contents = bytearray(file.read_bytes())
    if how == "flipped":
        contents[-3] ^= 16
    file.write_bytes(contents if how == "flipped" else contents[:-3])
    with pytest.raises(ValueError, match=rf"out\.parquet\.partial/{name}: expected .* damaged"):
        add_kd_cache(rows(4), model, TOKENIZER, output, **options)
    assert not output.exists()
    file.unlink()
    forward, calls = model.forward, []
    monkeypatch.setattr(model, "forward", lambda **inputs: calls.append(1) or forward(**inputs))
    found = add_kd_cache(rows(4), model, TOKENIZER, output, **options)
    assert found.to_list() == whole.to_list()
    assert len(calls) == (0 if how == "settings" else 1)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "saved", "encoding"])
def test_a_damaged_input(tmp_path, kind):
    file = tmp_path / f"rows.{'parquet' if kind == 'parquet' else 'jsonl'}"
    source = str(file)
    if kind == "parquet":
        datasets.Dataset.from_list(rows()).to_parquet(file)
    elif kind == "saved":
        source = str(tmp_path / "saved")
        datasets.Dataset.from_list(rows()).save_to_disk(source)
        (file,) = (tmp_path / "saved").glob("*.arrow")
    else:
        file.write_text("\n".join(map(json.dumps, rows())), "utf-8")
    contents = file.read_bytes()
    broken = contents.replace(b"sky", b"\xff\xfe\xff") if kind == "encoding" else contents[:-100]
    file.write_bytes(broken)
    with pytest.raises(ValueError, match=source):
        list(read_rows(source))


def test_a_damaged_reward_head(tmp_path):
    model = tiny_model(TOKENIZER)
    add_reward_head(model)
    with saved_beside({"weight": model.reward_head.weight}, tmp_path):
        pass
    file = tmp_path / FILE
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode  # others may read it, too
    contents = file.read_bytes()
    for damaged in (contents[:-5], contents[:-5] + bytes([contents[-5] ^ 1]) + contents[-4:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{FILE}: expected"):
            load_reward_head(model, tmp_path)


def test_a_head_of_another_model_is_never_taken(tmp_path):
    """Saved over an older model and stopped in between: which model it is, nobody knows."""
    with saved_beside({"weight": torch.zeros(1, 16)}, tmp_path):
        pass
    with pytest.raises(KeyboardInterrupt), saved_beside({"weight": torch.ones(1, 16)}, tmp_path):
        raise KeyboardInterrupt  # while the model is written
    for look in (folder_has_reward_head, lambda place: load_reward_head(None, place)):
        with pytest.raises(ValueError, match=f"folder: expected .*, got .*{UNFINISHED}"):
            look(tmp_path)
    with saved_beside({"weight": torch.ones(1, 16)}, tmp_path):
        pass
    assert load_tensors(tmp_path / FILE)["weight"].sum() == 16


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model(tmp_path, name):
    tiny_model(TOKENIZER).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"teacher: expected a model folder.*{tmp_path}"):
        load_teacher(str(tmp_path))


def test_files_of_one_name_are_told_apart(tmp_path):
    """By more than their name and time: a clock may be set back, and copies keep their times."""
    file = tmp_path / "pairs.parquet"
    for answer in ("yes", "no!"):
        table = pyarrow.table({"chosen": [answer]})
        pyarrow.parquet.write_table(table, file)
        os.utime(file, (1e9, 1e9))
        assert read_rows(str(file))["chosen"] == [answer]


def test_a_name_is_no_pattern(written, tmp_path):
    for name in ("out[1].parquet", "out*.parquet"):
        shutil.copy(written, tmp_path / name)
        pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "out1.parquet")
        assert load_shaping(tmp_path / name).to_list() == load_shaping(written).to_list()
