"""The code in docs/trainers.md runs as it stands, with small models in the large ones' place."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import rows, tiny_model
from training import SETTINGS, TOKENIZER, student
from transformers import TrainingArguments

import fastpref.integrations.trl
from fastpref import reference
from fastpref.models.fused_head import add_fused_head

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text("utf-8")
TVKD, DRDO, PLAIN = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for seed, name in enumerate(("Llama-3.1-8B-Instruct", "Llama-3.2-1B-Instruct")):
        path = tmp_path / "meta-llama" / name
        tiny_model(TOKENIZER, seed=seed).save_pretrained(path)
        TOKENIZER.save_pretrained(path)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows())), "utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("TVKDConfig", "DRDOConfig", "OracleConfig"):
        config = getattr(fastpref.integrations.trl, name)
        small = functools.partial(config, **SETTINGS | {"num_train_epochs": 1})
        monkeypatch.setattr(fastpref.integrations.trl, name, small)


def test_trl():
    names: dict = {}
    exec(TVKD, names)
    assert names["trainer"].state.global_step == 4
    exec(DRDO, names)
    assert Path("student-drdo/reward_head.safetensors").is_file()


def test_the_plain_trainer(tmp_path):
    names: dict = {}
    exec(PLAIN, names)
    model = student()
    add_fused_head(model)
    torch.manual_seed(0)
    pairs = [(torch.randint(5, 300, (2, 9)), torch.randn(2)) for _ in range(4)]

    def stack(batch):
        tokens = torch.stack([one for one, _ in batch]).transpose(0, 1).flatten(0, 1)
        shaping = torch.stack([one for _, one in batch]).transpose(0, 1).flatten()
        labels = tokens.clone()
        labels[:, :4] = -100
        return {"input_ids": tokens, "labels": labels, "shaping": shaping}

    args = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=1, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0, report_to="none", save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, average_tokens_across_devices=False,
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names["PlainTVKD"](model, args, train_dataset=pairs, data_collator=stack).train()

    naive = student()
    batch = stack(pairs)
    states = naive.model(batch["input_ids"])[0][:, :-1]
    reference.tvkd_loss(
        states, naive.lm_head.weight, batch["labels"][:, 1:], batch["shaping"], beta=0.01
    ).backward()
    for name, parameter in naive.named_parameters():
        expected = before[name] - parameter.grad
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-4, atol=1e-4)
