"""Trainers whose model has a reward head, which is saved and loaded beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from fastpref.integrations.trl.base import FusedPreferenceTrainer
from fastpref.models.reward_head import (
    FILE,
    add_reward_head,
    has_reward_head,
    load_reward_head,
    rewards_at_head,
    save_reward_head,
    take_reward_head,
)


class RewardHeadTrainer(FusedPreferenceTrainer):
    """A model with a linear reward head: its own, that of the folder it came from, or a new one."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **options: Any) -> None:
        super().__init__(model, ref_model, args, **options)
        source = model if isinstance(model, str) else get_config_model_id(model.config)
        if has_reward_head(self.model) or not (Path(source) / FILE).is_file():
            add_reward_head(self.model)
        else:
            load_reward_head(self.model, source)

    def rewards(self, states: Tensor, labels: Tensor) -> Tensor:
        """(2B,) the model's own rewards."""
        return rewards_at_head(self.accelerator.unwrap_model(self.model), states, labels)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        state_dict = dict(self.model.state_dict() if state_dict is None else state_dict)
        # Engines that keep a model in files of their own, head and all, have nothing here.
        head = take_reward_head(state_dict) if state_dict else None
        super()._save(output_dir, state_dict)
        if self.args.should_save and head is not None:
            save_reward_head(head, str(output_dir or self.args.output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self._engine_restores_heads():
            load_reward_head(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self._engine_restores_heads():
            load_reward_head(self.model, str(self.state.best_model_checkpoint))

    def _engine_restores_heads(self) -> bool:
        """DeepSpeed and FSDP load every parameter from files of their own, in shards."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)
