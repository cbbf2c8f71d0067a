"""The code in docs/values.md and docs/kd_cache.md runs, with small models for large ones."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from pages import blocks, commands
from tiny_models import rows, tiny_model, tiny_tokenizer

import fastpref.integrations.trl
from fastpref.cli import main
from fastpref.teacher import add_kd_cache, load_teacher

TEACHER, STUDENT = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    for seed, name in enumerate((TEACHER, STUDENT, "my-8b-dpo", "my-8b-sft")):
        tiny_model(tokenizer, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows())), "utf-8")
    monkeypatch.chdir(tmp_path)


def test_python():
    names: dict = {}
    for code in blocks("docs/values.md"):
        exec(code, names)
    assert len(names["dataset"]["chosen_shaping"]) == len(rows())


def test_the_commands(monkeypatch):
    for command in commands("docs/values.md", "fastpref"):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    assert Path("pairs-with-values.parquet").is_file()
    assert Path("pairs-with-rewards.parquet").is_file()


def test_distributions(monkeypatch):
    """The command; then a server's answers, here of the same teacher, give its likeliest tokens."""
    (command,) = commands("docs/kd_cache.md", "fastpref")
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    training, serving = blocks("docs/kd_cache.md")
    small = functools.partial(
        fastpref.integrations.trl.PreferenceConfig, use_cpu=True, bf16=False, max_steps=2,
        per_device_train_batch_size=2, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    monkeypatch.setattr(fastpref.integrations.trl, "PreferenceConfig", small)
    names: dict = {}
    exec(training, names)
    assert names["trainer"].state.global_step == 2

    model, tokenizer = load_teacher(TEACHER)

    def ask(request):
        tokens = torch.tensor([request["prompt"]])
        top = model(tokens).logits[0, :-1].log_softmax(-1).topk(request["prompt_logprobs"])
        positions = [
            {str(token): {"logprob": logp} for token, logp in zip(*one, strict=True)}
            for one in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        return {"choices": [{"prompt_logprobs": json.loads(json.dumps([None, *positions]))}]}

    names = {"tokenizer": tokenizer, "ask": torch.no_grad()(ask)}
    exec(serving, names)
    expected = add_kd_cache("pairs.jsonl", model, tokenizer, "tokens.parquet", top_k=20)
    for row, one in zip(names["rows"], expected, strict=True):
        for side in ("chosen", "rejected"):
            column = f"{side}_teacher_token_ids"
            assert [set(ids) for ids in row[column]] == [set(ids) for ids in one[column]]
            column = f"{side}_teacher_token_logps"
            found, other = torch.tensor(row[column]), torch.tensor(one[column])
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)
