"""TVKD in OpenRLHF's DPO trainer: log-probabilities without the logits, and a loss with shaping.

In a copy of `openrlhf/cli/train_dpo.py` (0.11.2, against which this was written):

- `PairsWithShaping` takes the place of `RewardDataset`, and `TVKDTrainer` that of `DPOTrainer`;
- `teach_head(model)` stands after the model is made, and before `strategy.prepare`.

The dataset has the columns that `fastpref values` adds.
"""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.datasets import RewardDataset
from openrlhf.trainer.dpo_trainer import DPOTrainer
from torch import Tensor

import fastpref
from fastpref.models import add_fused_head

SHAPING = ("chosen_shaping", "rejected_shaping")


class PairsWithShaping(RewardDataset):
    """Pairs whose prompt's length carries the teacher's shaping of both responses along."""

    def process_data(self, data: dict[str, Any]) -> dict[str, Any]:
        """What OpenRLHF makes of a row, its `extra` now with the shaping."""
        found = super().process_data(data)
        found["extra"] = [found["extra"], *(data[name] for name in SHAPING)]
        return found


class TVKDTrainer(DPOTrainer):
    """OpenRLHF's trainer with another loss; of `beta` it keeps the meaning."""

    alpha = 0.7

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        if options["strategy"].args.ds.packing_samples:
            raise ValueError("packing_samples: expected False, got True")
        super().__init__(model, *arguments, **options)
        self.loss_fn = self.tvkd
        self.shaping: Tensor | None = None

    def concatenated_forward(
        self, model: Any, chosen_ids: Tensor, c_mask: Tensor, reject_ids: Tensor, r_mask: Tensor,
        extras: list[list[float]],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Summed log-probabilities of both responses, and the chosen ones' mean loss."""
        if model is self.ref_model:  # TVKD has none
            nothing = torch.zeros(len(chosen_ids), device=chosen_ids.device)
            return nothing, nothing, nothing.sum(), nothing.sum()
        tokens, mask, _ = self.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask, extras)
        prompts, *shaping = torch.tensor(extras, device=tokens.device).unbind(1)
        self.shaping = torch.cat(shaping)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        in_prompt = positions < torch.cat([prompts, prompts]).unsqueeze(1)
        labels = tokens.masked_fill(in_prompt | (mask == 0), -100)[:, 1:]

        def at_head(states: Tensor, head: fastpref.Head) -> dict[str, Tensor]:
            return {"logps": fastpref.linear_logps(states[:, :-1], head, labels)}

        wrapped = model.model  # the language model, or DeepSpeed's engine around it
        outputs = wrapped(tokens, attention_mask=mask, at_head=at_head)
        responses = fastpref.sum_responses(outputs["logps"], labels)
        per_token = responses.per_token(responses.logps)[: len(chosen_ids)]
        aux_loss = outputs.get("aux_loss", 0)
        return *responses.logps.chunk(2), aux_loss, -per_token.mean()

    def tvkd(self, chosen: Tensor, rejected: Tensor, *_reference: Tensor) -> tuple[Tensor, ...]:
        """Loss and rewards, in the place of OpenRLHF's DPOLoss."""
        logps = torch.cat([chosen, rejected])
        lengths = torch.ones_like(logps, dtype=torch.int64)  # read only to normalise by length
        responses = fastpref.Responses(logps, lengths)
        out = fastpref.losses.tvkd(responses, self.shaping, beta=self.beta, alpha=self.alpha)
        return out.loss, out.chosen_rewards, out.rejected_rewards


def teach_head(model: Any) -> Any:
    """An `Actor` whose model runs a loss at its head; call it before `strategy.prepare`."""
    add_fused_head(model.model)
    return model
