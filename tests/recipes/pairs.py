"""Pairs with a shaping, and the steps that the recipes have to make of them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import rows
from torch import Tensor

import fastpref
from fastpref.models import head_states, lm_head_of


def pairs_with_shaping(count: int = 4) -> list[dict[str, Any]]:
    """Of various lengths; the shaping is as large as what it is added to."""
    return [
        {**row, "chosen_shaping": 0.1 * index, "rejected_shaping": -0.3}
        for index, row in enumerate(rows(count))
    ]


def tvkd(model: Any, batch: dict[str, Tensor], **options: float) -> fastpref.LossOutput:
    """The loss of a batch of `collate_pairs`, as README's loop has it."""
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = head_states(model, **tokens)[:, :-1]
    return fastpref.tvkd_loss(
        states, lm_head_of(model), batch["labels"], batch["shaping"], **options
    )


def sgd_step(model: Any, batch: dict[str, Tensor], rate: float, **options: float) -> Tensor:
    """The loss; the model makes a step."""
    out = tvkd(model, batch, **options)
    out.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
            parameter.grad = None
    return out.loss.detach()
