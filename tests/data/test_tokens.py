"""Rows become the tokens that TRL's own trainer would make of them."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tiny_models import conversation, rows, tiny_model, tiny_tokenizer
from trl import DPOConfig, DPOTrainer

from fastpref.data.rows import read_rows
from fastpref.data.tokens import pad_pairs, tokenize_rows

# Renders a prompt alone differently from a prompt that is answered, as templates of "thinking"
# models do.
THINKING_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> <think></think>{% endif %}"
)
OPTIONS_TEMPLATE = (
    "{% if shout is defined and shout %}LOUD {% endif %}"
    "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def implicit(row: dict) -> dict:
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def standard(row: dict) -> dict:
    return {key: value[0]["content"] + " " * (key == "prompt") for key, value in row.items()}


def with_options(row: dict) -> dict:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    return {**row, "tools": json.dumps(tools), "chat_template_kwargs": {"shout": True}}


FORMATS = {
    "conversational": (rows(), None),
    "conversational, implicit prompt": ([implicit(row) for row in rows()], None),
    "standard": ([standard(row) for row in rows()], None),
    "standard, implicit prompt": ([implicit(standard(row)) for row in rows()], None),
    "standard, ends already": (
        [{**standard(row), "chosen": standard(row)["chosen"] + "</s>"} for row in rows()],
        None,
    ),
    "a template that thinks": (rows(), THINKING_TEMPLATE),
    "tools and template options": ([with_options(row) for row in rows()], OPTIONS_TEMPLATE),
    "several turns": (
        [
            {
                **row,
                "prompt": [*row["prompt"], {"role": "assistant", "content": "yes"}, *row["prompt"]],
            }
            for row in rows()
        ],
        None,
    ),
}


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_trl(name, max_length, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    examples, template = FORMATS[name]
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
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
    pairs, bad = tokenize_rows(
        Dataset.from_list(examples), tokenizer, max_length=max_length, context_length=None
    )

    kept = trainer.train_dataset
    assert len(kept) + len(bad) == len(examples) and len(kept) == len(pairs) > 0
    for pair, theirs in zip(pairs, kept, strict=True):
        batch = trainer.data_collator([theirs])
        tokens, attention, labels = pad_pairs([pair])
        mask = batch["completion_mask"].bool()
        assert pair.prompt.tolist() == theirs["prompt_ids"]
        assert torch.equal(attention, batch["attention_mask"])
        assert torch.equal(tokens[attention.bool()], batch["input_ids"][attention.bool()])
        wanted = torch.where(mask, batch["input_ids"], -100)[:, 1:]
        assert torch.equal(labels, wanted)


def test_a_file_gives_the_same_tokens_as_a_dataset(tmp_path):
    tokenizer = tiny_tokenizer()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows())), "utf-8")
    Dataset.from_list(rows()).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(rows()).save_to_disk(tmp_path / "saved")

    def tokens(source) -> list[list[list[int]]]:
        pairs, bad = tokenize_rows(source, tokenizer, max_length=None, context_length=None)
        assert not bad
        return [[part.tolist() for part in pair[1:]] for pair in pairs]

    expected = tokens(rows())
    for source in (file, tmp_path / "rows.parquet", tmp_path / "saved"):
        assert tokens(read_rows(str(source))) == expected


def test_a_response_that_nothing_precedes_loses_its_first_token_only():
    row = {"prompt": "", "chosen": "the sky", "rejected": "rain"}
    (pair,), bad = tokenize_rows([row], tiny_tokenizer(), max_length=None, context_length=None)
    assert not bad and len(pair.prompt) == 0
    tokens, _, labels = pad_pairs([pair])
    assert torch.equal(labels[0][labels[0] != -100], tokens[0, 1 : len(pair.chosen)])


def test_one_token_that_nothing_precedes_is_no_response():
    row = {"prompt": "", "chosen": "the sky", "rejected": "</s>"}
    pairs, bad = tokenize_rows([row], tiny_tokenizer(), max_length=None, context_length=None)
    assert not pairs and bad == [(0, "a response of one token that nothing precedes")]


def test_truncation_keeps_the_start():
    row = conversation("what is it", "the sky " * 30, "rain")
    (whole,), _ = tokenize_rows([row], tiny_tokenizer(), max_length=None, context_length=None)
    (cut,), _ = tokenize_rows([row], tiny_tokenizer(), max_length=20, context_length=None)
    assert len(cut.prompt) + len(cut.chosen) == 20
    assert cut.chosen.tolist() == whole.chosen[: len(cut.chosen)].tolist()


def test_what_is_no_fault_of_a_row_is_raised(monkeypatch):
    options = {"max_length": None, "context_length": None}
    with pytest.raises(ValueError, match="^tokenizer: expected a tokenizer .* got NoneType"):
        tokenize_rows(rows(1), None, **options)

    def without_jinja(*_, **__):
        raise ImportError("apply_chat_template requires jinja2")

    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "apply_chat_template", without_jinja)
    with pytest.raises(ImportError, match="jinja2"):
        tokenize_rows([conversation("a", "b", "c")], tokenizer, **options)
