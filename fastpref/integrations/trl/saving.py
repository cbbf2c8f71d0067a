"""Trainers whose model may have a reward head, which is saved and loaded beside the model."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import sort_checkpoints
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import get_config_model_id

from fastpref.models import reward_head


class SavesRewardHead(DPOTrainer):
    """DPOTrainer that keeps a model's reward head in a file of its own."""

    model: Any  # what transformers leaves open

    def give_reward_head(self, source: Any) -> None:
        """Its own reward head, or that of the folder or model it came from, or a new one."""
        folder = source if isinstance(source, str) else get_config_model_id(source.config)
        # A model that is from nowhere has the name "", which as a folder would be the current one.
        saved = bool(folder) and reward_head.folder_has_reward_head(folder)
        if saved and not reward_head.has_reward_head(self.model):
            reward_head.load_reward_head(self.model, folder)
        else:
            reward_head.add_reward_head(self.model)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        head = None
        if reward_head.has_reward_head(self.model):
            state_dict = dict(self.model.state_dict() if state_dict is None else state_dict)
            # Engines that keep a model in files of their own, head and all, have nothing here.
            head = reward_head.take_reward_head(state_dict) if state_dict else None
        saving = (
            reward_head.saved_beside(head, str(output_dir or self.args.output_dir))
            if self.args.should_save and head is not None
            else nullcontext()
        )
        with saving:
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # transformers deletes the oldest ones by their time: the newest, where the clock went back.
        run = self._get_output_dir(trial=trial)
        folders = [Path(one) for one in sort_checkpoints(run)]
        now = time.time()
        if any(folder.stat().st_mtime > now for folder in folders):
            for age, folder in enumerate(reversed(folders), start=1):
                os.utime(folder, (now - age, now - age))
        super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]  # not typed there

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_head(self.model, str(self.state.best_model_checkpoint))

    def _load_head(self, model: Any, folder: str) -> None:
        # DeepSpeed and FSDP load every parameter from files of their own, in shards.
        if reward_head.has_reward_head(model) and not (
            self.is_deepspeed_enabled or self.is_fsdp_enabled
        ):
            reward_head.load_reward_head(model, folder)
