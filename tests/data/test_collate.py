"""Batches are those that TRL's own trainer would make of the same rows."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from tiny_models import conversation, rows, tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer

import fastpref
from fastpref import collate_pairs

SHAPING = {"chosen_shaping": 0.5, "rejected_shaping": -0.25}
REWARDS = {"chosen_reward": 3, "rejected_reward": 1.5}


def standard(row: dict) -> dict:
    return {key: value[0]["content"] + " " * (key == "prompt") for key, value in row.items()}


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("examples", [rows(), list(map(standard, rows()))], ids=["chat", "text"])
def test_a_batch_is_that_of_trl(examples, max_length, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    tokenizer = tiny_tokenizer()
    examples = [row | REWARDS for row in examples]
    config = DPOConfig(
        output_dir=str(tmp_path), max_length=max_length, report_to="none", use_cpu=True, bf16=False
    )
    trainer = DPOTrainer(
        tiny_model(tokenizer),
        ref_model=tiny_model(tokenizer),
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    theirs = trainer.data_collator(list(trainer.train_dataset))
    batch = collate_pairs(examples, tokenizer, max_length=max_length)

    attended = theirs["attention_mask"].bool()
    assert torch.equal(batch["attention_mask"], theirs["attention_mask"])
    assert torch.equal(batch["input_ids"][attended], theirs["input_ids"][attended])
    in_response = theirs["completion_mask"].bool()
    assert torch.equal(batch["labels"], torch.where(in_response, theirs["input_ids"], -100)[:, 1:])
    assert torch.equal(batch["oracle_rewards"], torch.tensor([3.0] * 7 + [1.5] * 7))
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "oracle_rewards"}


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "dataset"])
def test_in_a_loader(make):
    tokenizer = tiny_tokenizer()
    examples = [{**row, **SHAPING, "chosen_shaping": float(i)} for i, row in enumerate(rows(5))]
    loader = DataLoader(
        make(examples), batch_size=2, collate_fn=partial(collate_pairs, tokenizer=tokenizer)
    )
    batches = list(loader)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    assert batches[1]["shaping"].tolist() == [2.0, 3.0, -0.25, -0.25]
    assert batches[1]["shaping"].dtype == torch.float32
    model = tiny_model(tokenizer)
    for batch in batches:
        states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        loss = fastpref.tvkd_loss(
            states[:, :-1], model.lm_head.weight, batch["labels"], batch["shaping"]
        ).loss
        assert loss.isfinite()


BAD = {
    "a missing response": ({"prompt": "what", "chosen": "the sky"}, "row 1: rejected is missing"),
    "an empty response": (standard(conversation("a", "b", " ")), "row 1: rejected is empty"),
    "no row": (["chosen"], "row 1: expected an object"),
    "NaN": (rows()[0] | SHAPING | {"chosen_shaping": math.nan}, "row 1: chosen_shaping must be"),
    "infinity": (rows()[0] | SHAPING | {"rejected_shaping": math.inf}, "row 1: rejected_shaping"),
    "beyond float32": (rows()[0] | SHAPING | {"chosen_shaping": 1e39}, "a finite number, got 1e"),
    "text": (rows()[0] | SHAPING | {"chosen_shaping": "1"}, "a finite number, got '1'"),
    "None": (rows()[0] | SHAPING | {"chosen_shaping": None}, "a finite number, got None"),
    "no number": (rows()[0], "row 1: chosen_shaping must be a finite number, got None"),
    "one column": (rows()[0] | {"chosen_shaping": 1.0}, "row 1: rejected_shaping must be"),
    "one reward": (rows()[0] | SHAPING | {"chosen_reward": 1.0}, "row 1: rejected_reward must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name):
    row, reason = BAD[name]
    with pytest.raises(ValueError, match=f"^rows: .*{reason}") as caught:
        collate_pairs([rows()[0] | SHAPING, row], tiny_tokenizer())
    assert "The first of them: " in str(caught.value)


def test_a_prompt_that_fills_the_length_is_refused():
    with pytest.raises(ValueError, match="row 0: the prompt alone has .* max_length is 4"):
        collate_pairs(rows(2), tiny_tokenizer(), max_length=4)


def test_no_rows_and_no_length_are_refused():
    with pytest.raises(ValueError, match="^rows: expected at least one"):
        collate_pairs([], tiny_tokenizer())
    with pytest.raises(ValueError, match="^max_length: expected"):
        collate_pairs(rows(2), tiny_tokenizer(), max_length=1)
