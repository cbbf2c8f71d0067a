"""Scores are the rewards that training reads, of any format of rows."""

from __future__ import annotations

import pytest
import torch
from tiny_models import rows, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

from fastpref import sequence_rewards
from fastpref.data import collate_pairs
from fastpref.models import add_reward_head, load_reward_head
from fastpref.models.reward_head import saved_beside
from fastpref.teacher import score


@pytest.fixture
def oracle():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    add_reward_head(model)
    return model, tokenizer


@torch.no_grad()
def naive(model, tokenizer, one: dict) -> torch.Tensor:
    batch = collate_pairs([one], tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = model.model(**inputs).last_hidden_state
    return sequence_rewards(states, batch["labels"], model.reward_head.weight)


def test_pairs_and_completions(oracle):
    found = score(*oracle, rows(5), batch_size=2)
    assert found.shape == (5, 2) and not found.requires_grad
    for row, one in zip(rows(5), found, strict=True):
        torch.testing.assert_close(one, naive(*oracle, row))
        torch.testing.assert_close(score(*oracle, row), one)
    sides = [
        [{"prompt": row["prompt"], "completion": row[side]} for row in rows(5)]
        for side in ("chosen", "rejected")
    ]
    torch.testing.assert_close(torch.stack([score(*oracle, one) for one in sides], 1), found)
    assert score(*oracle, sides[0][0]).shape == ()
    assert score(*oracle, []).shape == (0, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "a", "completion": ""}, "rows: 1 bad row: row 0: completion is empty"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "row 1: completion is missing"),
        ([{"prompt": "a"}], "row 0: chosen is missing"),
        ([5], "row 0: expected an object"),
    ],
)
def test_rows_that_cannot_be_used(oracle, given, message):
    with pytest.raises(ValueError, match=message):
        score(*oracle, given)


def test_a_model_without_a_reward_head():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="model: expected a reward head"):
        score(tiny_model(tokenizer), tokenizer, rows(1))


@pytest.mark.parametrize("size", ["1GB", "5KB"])
def test_a_head_among_the_weights_is_found(oracle, tmp_path, size):
    """As ``save_pretrained`` writes it, also over a folder where an older one has its own file."""
    model, tokenizer = oracle
    with saved_beside({"weight": torch.zeros(1, 16)}, tmp_path):
        pass
    model.save_pretrained(tmp_path, max_shard_size=size)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    load_reward_head(again, tmp_path)
    row = rows(1)[0]
    torch.testing.assert_close(score(again, tokenizer, row), score(model, tokenizer, row))


def test_a_head_of_merged_adapters_is_found(oracle, tmp_path):
    peft = pytest.importorskip("peft")
    model, tokenizer = oracle
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    load_reward_head(again, tmp_path)
    found = score(again, tokenizer, rows(2))
    torch.testing.assert_close(found, score(merged, tokenizer, rows(2)))
