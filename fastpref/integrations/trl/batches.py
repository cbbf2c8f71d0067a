"""Batches that are made of the collator's: halves, mismatched pairs, the student's own words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl.trainer.utils import flush_left

from fastpref.data.tokens import IGNORE_INDEX

Batch = dict[str, Tensor]


def shifted_labels(inputs: Batch) -> Tensor:
    """(2B, T) the tokens that all states but the last predict, -100 outside the responses."""
    tokens, mask = inputs["input_ids"], inputs["completion_mask"]
    return tokens.masked_fill(mask == 0, IGNORE_INDEX)[:, 1:]


def chosen_half(inputs: Batch) -> Batch:
    """The chosen responses of a batch, for losses that read no others."""
    rows = len(inputs["input_ids"])
    return {
        name: values[: rows // 2] if len(values) == rows else values
        for name, values in inputs.items()
    }


def mismatched(inputs: Batch, max_length: int | None) -> Batch:
    """Each prompt with the response of the row before it: sequences as long as they may be."""
    tokens, is_response = inputs["input_ids"], inputs["completion_mask"]
    prompts = (inputs["attention_mask"] - is_response).sum(1)
    others, starts = tokens.roll(1, 0), prompts.roll(1, 0)
    lengths = prompts + is_response.sum(1).roll(1, 0)
    if max_length is not None:
        lengths = lengths.clamp_max(max_length)
    positions = torch.arange(int(lengths.max()), device=tokens.device).expand(len(tokens), -1)
    in_prompt = positions < prompts.unsqueeze(1)
    at = torch.where(in_prompt, positions, positions + (starts - prompts).unsqueeze(1))
    at = at.clamp(0, tokens.shape[1] - 1)  # beyond the sequence, which the masks leave out
    mask = positions < lengths.unsqueeze(1)
    return {
        "input_ids": torch.where(in_prompt, tokens.gather(1, at), others.gather(1, at)),
        "attention_mask": mask.to(is_response.dtype),
        "completion_mask": (mask & ~in_prompt).to(is_response.dtype),
    }


def written_by(model: Any, inputs: Batch, tokenizer: Any, options: dict[str, Any]) -> Batch:
    """The prompts of a batch with responses that a model writes to them, its end token included."""
    tokens, is_response = inputs["input_ids"], inputs["completion_mask"]
    lengths = (inputs["attention_mask"] - is_response).sum(1, keepdim=True)
    width = int(lengths.max())
    # Generation goes on at the last column, so that prompts are padded on their left.
    at = torch.arange(width, device=tokens.device) - (width - lengths)
    in_prompt = (at >= 0).to(is_response.dtype)
    pad = tokenizer.pad_token_id
    prompts = torch.where(at >= 0, tokens.gather(1, at.clamp_min(0)), pad)
    end = model.generation_config.eos_token_id
    config = GenerationConfig(  # type: ignore[no-untyped-call]  # of transformers
        **options, do_sample=True, top_k=0, top_p=1.0, pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id if end is None else end,
    )  # fmt: skip
    whole = model.generate(input_ids=prompts, attention_mask=in_prompt, generation_config=config)
    ends = torch.isin(whole[:, width:], torch.tensor(config.eos_token_id, device=whole.device))
    written = (ends.cumsum(1) - ends.to(torch.int64) == 0).to(is_response.dtype)
    mask, whole, completion = flush_left(
        torch.cat([in_prompt, written], 1),
        whole,
        torch.cat([torch.zeros_like(in_prompt), written], 1),
    )
    return {**inputs, "input_ids": whole, "attention_mask": mask, "completion_mask": completion}
