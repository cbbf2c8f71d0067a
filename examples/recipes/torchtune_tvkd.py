"""TVKD in torchtune's DPO recipes: log-probabilities without the logits, and a loss with shaping.

Make a copy of a recipe (`tune cp lora_dpo_single_device my_recipe.py`), let its class inherit from
`TVKDRecipe` first, and name the dataset and the loss in its configuration (docs/recipes.md has it):

    class MyRecipe(TVKDRecipe, LoRADPORecipeSingleDevice): ...

Written against torchtune 0.6.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtune.data import ChosenRejectedToMessages
from torchtune.datasets import PreferenceDataset
from torchtune.modules import TiedLinear

import fastpref

SHAPING = ("chosen_shaping", "rejected_shaping")


class PairsWithShaping(PreferenceDataset):
    """Tokens of a pair, and the teacher's shaping of both responses."""

    def _prepare_sample(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        return super()._prepare_sample(sample) | {name: sample[name] for name in SHAPING}


def pairs_with_shaping(tokenizer: Any, **load_options: Any) -> PairsWithShaping:
    """Pairs whose `chosen` and `rejected` are whole conversations, from a file."""
    transform = ChosenRejectedToMessages()
    return PairsWithShaping(tokenizer=tokenizer, message_transform=transform, **load_options)


def logps_of_responses(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """(n,) summed log-probabilities; `labels` are torchtune's: not shifted, -100 outside."""
    targets, output = labels[:, 1:], model.output
    if not isinstance(output, torch.nn.Linear | TiedLinear):  # LoRA on it, a soft cap
        raise ValueError(f"model: expected a plain output projection, got {type(output).__name__}")
    weight = output.tied_module.weight if isinstance(output, TiedLinear) else output.weight

    def at_head(states: Tensor) -> Tensor:
        return fastpref.linear_logps(model.norm(states)[:, :-1], weight, targets)

    model.unembed = at_head  # which torchtune's decoder calls after its last layer
    try:
        logps = model(tokens)
    finally:
        del model.unembed
    return fastpref.sum_responses(logps, targets).logps


class TVKDLoss(torch.nn.Module):
    """TVKD's loss of log-probabilities; the batch's shaping is set before it is called."""

    shaping: Tensor

    def __init__(self, beta: float = 0.1, alpha: float = 1.0) -> None:
        super().__init__()
        self.options = {"beta": beta, "alpha": alpha}

    def forward(self, chosen: Tensor, rejected: Tensor, *_reference: Tensor) -> tuple[Tensor, ...]:
        """Loss and rewards, in the place of torchtune's DPOLoss, whose reference TVKD has not."""
        logps = torch.cat([chosen, rejected])
        lengths = torch.ones_like(logps, dtype=torch.int64)  # read only to normalise by length
        responses = fastpref.Responses(logps, lengths)
        out = fastpref.losses.tvkd(responses, self.shaping.to(logps), **self.options)
        return out.loss, out.chosen_rewards, out.rejected_rewards


class TVKDRecipe:
    """What a DPO recipe of torchtune does in another way; put it before the recipe's own class."""

    def _setup_data(self, *arguments: Any, **options: Any) -> Any:
        found = super()._setup_data(*arguments, **options)  # type: ignore[misc]  # of the recipe
        loader = found[-1] if isinstance(found, tuple) else found
        tokens_of = loader.collate_fn

        def collate(rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
            shaping = torch.tensor([row[name] for name in SHAPING for row in rows])
            return *tokens_of(rows), shaping

        loader.collate_fn = collate
        return found

    def concatenated_forward(
        self, model: Any, batch: tuple[Tensor, ...], *_: Any, **__: Any
    ) -> tuple[Tensor, ...]:
        """Log-probabilities of chosen and rejected responses; NaN where their logits would be."""
        recipe: Any = self
        tokens, labels, recipe._loss_fn.shaping = (one.to(recipe._device) for one in batch)
        with recipe.activations_handling_ctx:
            logps = logps_of_responses(model, tokens, labels)
        nothing = logps.new_tensor(torch.nan)  # the recipe logs the mean of the logits
        return *logps.chunk(2), nothing, nothing
