"""The code in docs/trainers.md runs as it stands, with small models in the large ones' place."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import formulas
import pytest
import torch
from datasets import Dataset
from pages import blocks, commands
from tiny_models import rows, tiny_model
from training import SETTINGS, TOKENIZER, signal, student
from transformers import TrainingArguments

import fastpref.integrations.trl
from fastpref.cli import main
from fastpref.data import read_rows

PAGE = "docs/trainers.md"
TVKD, DRDO, SCORE, SIMPO, DCKD, MIXED, METHOD, PLAIN = blocks(PAGE)
(REWARDS,) = (line for line in commands(PAGE, "fastpref") if line[1] == "rewards")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for seed, name in enumerate(("Llama-3.1-8B-Instruct", "Llama-3.2-1B-Instruct")):
        path = tmp_path / "meta-llama" / name
        tiny_model(TOKENIZER, seed=seed).save_pretrained(path)
        TOKENIZER.save_pretrained(path)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows())), "utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("TVKDConfig", "DRDOConfig", "OracleConfig", "PreferenceConfig"):
        config = getattr(fastpref.integrations.trl, name)
        small = functools.partial(config, **SETTINGS | {"num_train_epochs": 1})
        monkeypatch.setattr(fastpref.integrations.trl, name, small)


def test_trl(monkeypatch):
    names: dict = {}
    exec(TVKD, names)
    assert names["trainer"].state.global_step == 4
    exec(DRDO, names)
    assert Path("student-drdo/reward_head.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", REWARDS)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert {"chosen_reward", "rejected_reward"} <= set(read_rows(REWARDS[-1]).column_names)
    exec(SCORE, names)
    assert names["reward"].isfinite() and names["reward"] != 0
    for code in (SIMPO, DCKD, MIXED):
        exec(code, names)
        assert names["trainer"].state.global_step == 4
    assert {"losses/tvkd", "losses/sft", "losses/vanilla_kd"} <= set(
        names["trainer"].state.log_history[0]
    )


def test_a_method_of_ones_own(tmp_path):
    (tmp_path / "hinge.py").write_text(METHOD, "utf-8")
    options = {name: value for name, value in SETTINGS.items() if name != "learning_rate"}
    script = f"""
import torch, fastpref
from datasets import load_dataset
from hinge import hinge  # where the page has a line in fastpref/losses/__init__.py
responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
assert hinge(responses, beta=0.25).loss.item() == 0.5
pairs = load_dataset("json", data_files="pairs.jsonl", split="train")
{SIMPO.replace("simpo", "hinge").replace("method=", f"**{options}, method=")}
assert trainer.state.global_step == 8 and trainer.args.beta == 0.1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [Dataset.from_list, list])
def test_the_plain_trainer(kind, tmp_path):
    columns = signal("shaping", 4)
    pairs = [
        {**row, **{name: values[index] for name, values in columns.items()}, "unused": "x"}
        for index, row in enumerate(rows(4))
    ]
    model = student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {
        "model": model,
        "tokenizer": TOKENIZER,
        "train_dataset": kind(pairs),
        "eval_dataset": kind(pairs),
        "args": TrainingArguments(
            str(tmp_path), use_cpu=True, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_steps=1, learning_rate=1.0, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0, report_to="none", save_strategy="no",
            disable_tqdm=True,
        ),
    }  # fmt: skip
    naive = student()
    batch = fastpref.collate_pairs(pairs, TOKENIZER)
    losses = [naive_loss(naive, batch)]
    losses[0].backward()
    exec(PLAIN, names)
    for name, parameter in naive.named_parameters():
        expected = before[name] - parameter.grad
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-4, atol=1e-4)
    evaluated = names["trainer"].evaluate()["eval_loss"]
    assert evaluated == pytest.approx(naive_loss(model, batch).item(), rel=1e-4)


def naive_loss(model, batch):
    states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0][:, :-1]
    return formulas.tvkd_loss(
        states, model.lm_head.weight, batch["labels"], batch["shaping"], beta=0.01
    )
