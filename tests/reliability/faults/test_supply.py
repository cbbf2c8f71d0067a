"""Nothing that lies in a folder is run: no pickles, no code of a model."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import datasets
import pytest
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref.data import read_rows
from fastpref.models.reward_head import load_reward_head
from fastpref.teacher import add_shaping, load_teacher
from fastpref.teacher.model import load_student, load_tokenizer

TOKENIZER = tiny_tokenizer()
CODE = "import os; os.mkdir({!r})"


class Malicious:
    """What runs when it is unpickled."""

    def __init__(self, traces):
        self.traces = traces

    def __reduce__(self):
        return os.mkdir, (str(self.traces),)


@pytest.fixture
def plant(tmp_path):
    """Puts pickles of the given names into a folder, and holds in the end that none was loaded."""
    traces = tmp_path / "traces"
    planted = []

    def put(folder, *names):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            planted.append(folder / name)
            planted[-1].write_bytes(pickle.dumps(Malicious(traces), protocol=2))

    yield put
    assert planted and not traces.exists()
    left = [one for one in planted if one.exists()]
    if left:
        pickle.loads(left[0].read_bytes())
        assert traces.exists()  # it would have


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(TOKENIZER).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


BESIDE = ("pytorch_model.bin", "model.pt", "tokenizer.pkl", "training_args.bin", "reward_head.pt")


def test_pickles_beside_a_model(saved, tmp_path, plant):
    shutil.copytree(saved, tmp_path / "model")
    plant(tmp_path / "model", *BESIDE)
    load_teacher(str(tmp_path / "model"))
    load_student(str(tmp_path / "model"))


def test_a_model_of_pickles_alone(saved, tmp_path, plant):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    plant(tmp_path / "model", *BESIDE, "reward_head.bin", "reward_head.pkl")
    with pytest.raises(ValueError, match="teacher: expected a model folder.*safetensors"):
        load_teacher(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="folder: expected a folder with reward_head.safetensors"):
        load_reward_head(None, tmp_path / "model")


def test_pickles_among_the_batches_of_a_precompute(tmp_path, plant):
    output = tmp_path / "out.parquet"
    names = ("batch-000000.pt", "batch-000000.safetensors.tmp", "settings.pkl", "lock.pkl")
    plant(tmp_path / "out.parquet.partial", *names)
    add_shaping(rows(2), tiny_model(TOKENIZER), TOKENIZER, output)
    shutil.rmtree(tmp_path / "out.parquet.partial", ignore_errors=True)
    plant(tmp_path / "out.parquet.partial", "batch-000000.safetensors")
    output.unlink()
    with pytest.raises(ValueError, match=r"batch-000000\.safetensors: expected .* damaged"):
        add_shaping(rows(2), tiny_model(TOKENIZER), TOKENIZER, output)


def test_pickles_as_datasets(tmp_path, plant):
    datasets.Dataset.from_list(rows(2)).save_to_disk(tmp_path / "saved")
    plant(tmp_path / "saved", "dataset.pkl", "state.pt", "indices.bin")
    assert len(read_rows(str(tmp_path / "saved"))) == 2
    plant(tmp_path / "files", "rows.pkl", "rows.pickle")
    plant(tmp_path, "rows.parquet", "rows.jsonl")
    for source in ("files", "rows.parquet", "rows.jsonl"):
        with pytest.raises((ValueError, datasets.exceptions.DatasetsError, OSError)):
            read_rows(str(tmp_path / source))


def test_code_of_a_model_is_not_run(saved, tmp_path, monkeypatch):
    """Nor is anybody asked whether to."""
    folder, traces = tmp_path / "model", tmp_path / "traces"
    shutil.copytree(saved, folder)
    (folder / "own.py").write_text(CODE.format(str(traces)), "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"model_type": "of_its_own", "architectures": ["Own"]}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")

    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    for load in (load_teacher, load_student, lambda name: load_tokenizer("student", name)):
        with pytest.raises(ValueError, match=f"(teacher|student): expected .*{folder}"):
            load(str(folder))
    assert not asked and not traces.exists()
