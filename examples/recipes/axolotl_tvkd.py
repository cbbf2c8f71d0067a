"""TVKD in axolotl: a plug-in for its option, and a trainer without the logits.

In the YAML file, beside models and a dataset with the columns that `fastpref values` adds:

    rl: dpo
    rl_beta: 0.01
    plugins: [axolotl_tvkd.TVKDPlugin]
    trainer_cls: axolotl_tvkd.TVKDTrainer
    tvkd_alpha: 0.7

Written against axolotl 0.19.0 and its TRL 1.9.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import Tensor

import fastpref
from fastpref.models import add_fused_head

SHAPING = ("chosen_shaping", "rejected_shaping")


class TVKDArgs(BaseModel):
    """What the plug-in adds to the YAML file."""

    tvkd_alpha: float = 1.0


@dataclass
class TVKDTrainingArgs:
    """The same, of the trainer's arguments."""

    tvkd_alpha: float = field(default=1.0, metadata={"help": "Weight of the teacher's shaping."})


class TVKDPlugin(BasePlugin):
    """Takes `tvkd_alpha` from the YAML file to the trainer."""

    def get_input_args(self) -> str:
        """Where axolotl finds the options."""
        return "axolotl_tvkd.TVKDArgs"

    def get_training_args_mixin(self) -> str:
        """Where axolotl finds the trainer's arguments."""
        return "axolotl_tvkd.TVKDTrainingArgs"

    def get_training_args(self, cfg: Any) -> dict[str, float]:
        """The values of these arguments."""
        return {"tvkd_alpha": cfg.tvkd_alpha}


class TVKDTrainer(AxolotlDPOTrainer):
    """axolotl's DPO trainer with another loss, which has no reference."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ref_model = None  # TRL made one, and a copy of the student is memory
        add_fused_head(self.model)
        tokens_of = self.data_collator

        def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            shaping = torch.tensor([row[name] for name in SHAPING for row in rows])
            return {**tokens_of(rows), "shaping": shaping}

        self.data_collator = collate

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """TVKD's mean over the pairs of a batch; logs margins and accuracies of `rewards/*`."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        found: list[fastpref.LossOutput] = []

        def at_head(states: Tensor, head: fastpref.Head) -> dict[str, Tensor]:
            out = fastpref.tvkd_loss(
                states[:, :-1], head, labels, inputs["shaping"],
                beta=self.args.beta, alpha=self.args.tvkd_alpha,
            )  # fmt: skip
            found.append(out)
            return {"loss": out.loss}

        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**tokens, at_head=at_head)
        margins = found[0].chosen_rewards - found[0].rejected_rewards
        metrics = self._metrics["train" if model.training else "eval"]
        metrics["rewards/margins"].append(margins.mean().item())
        metrics["rewards/accuracies"].append((margins > 0).float().mean().item())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
