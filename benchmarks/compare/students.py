"""The pairs and the students of the comparison: who is trained, and on what."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM
from trl.data_utils import maybe_extract_prompt
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from fastpref.teacher import read_rows


def load_pairs(
    dataset: str,
    tokenizer: Any,
    *,
    max_prompt_length: int,
    max_pairs: int | None,
    held_out: int,
) -> tuple[Dataset, Dataset]:
    """Pairs to train on and pairs held out, the same ones for every seed.

    A long conversation loses its oldest turns until its prompt has ``max_prompt_length`` tokens;
    pairs whose last turn alone is longer are left out.
    """
    pairs = Dataset.from_list([*read_rows(dataset)]).map(maybe_extract_prompt)
    options = {"tokenizer": tokenizer, "max_length": max_prompt_length}
    pairs = pairs.map(forget_oldest_turns, fn_kwargs=options)
    lengths = [prompt_length(prompt, tokenizer) for prompt in pairs["prompt"]]
    pairs = pairs.select([row for row, length in enumerate(lengths) if length <= max_prompt_length])
    pairs = pairs.shuffle(seed=0)
    pairs = pairs.select(range(min(len(pairs), max_pairs or len(pairs))))
    split = pairs.train_test_split(test_size=held_out, seed=0)
    return split["train"], split["test"]


def forget_oldest_turns(row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """A conversation's last turns, as many as fit; a system message and the last question stay."""
    prompt = row["prompt"]
    first = 1 if prompt[0]["role"] == "system" else 0
    while len(prompt) > first + 2 and prompt_length(prompt, tokenizer) > max_length:
        prompt = prompt[:first] + prompt[first + 2 :]
    return {"prompt": prompt}


def prompt_length(prompt: list[dict[str, str]], tokenizer: Any) -> int:
    """Tokens of a conversation and of what its template writes before an answer."""
    options = {"add_generation_prompt": True, "return_dict": True}
    return len(tokenizer.apply_chat_template(prompt, **options)["input_ids"])


def load_student(folder: str, *, layers: int | None, freeze_embeddings: bool) -> Any:
    """A model, or its first layers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if layers is not None:
        decoder, config = model.get_decoder(), model.config.get_text_config()
        decoder.layers = decoder.layers[:layers]
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    return model


def train_last_layers(model: Any, count: int) -> None:
    """Freeze everything but a model's last layers."""
    model.requires_grad_(False)
    model.get_decoder().layers[-count:].requires_grad_(True)


def fine_tune(student: Any, train: Dataset, tokenizer: Any, **options: Any) -> None:
    """A short SFT, because layers cut from a model no longer work together.

    It reads chosen and rejected responses alike. On the chosen ones alone a small model learns them
    by heart, and with them the preferences that the methods are about to teach.
    """
    sides = (
        train.select_columns(["prompt", side]).rename_column(side, "completion")
        for side in ("chosen", "rejected")
    )
    with TemporaryDirectory() as folder:
        config = SFTConfig(folder, **options, **plain_options())
        responses = concatenate_datasets(list(sides))
        SFTTrainer(
            student, args=config, train_dataset=responses, processing_class=tokenizer
        ).train()


def plain_options() -> dict[str, Any]:
    """Options of a small training: no files, no checkpointing, half precision on GPUs only."""
    gpu = torch.cuda.is_available()
    return {
        "bf16": gpu,
        "dataloader_pin_memory": gpu,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "report_to": "none",
    }
