"""Interrupted and resumed from a checkpoint, a training takes the way it would have taken."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_model
from training import TOKENIZER, assert_same, dataset, history, signal, student, trainer

from fastpref.integrations.trl import DRDOConfig, DRDOTrainer, TVKDConfig, TVKDTrainer

SAVING = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def tvkd(folder, **options):
    model = tiny_model(TOKENIZER, seed=7)
    return trainer(
        TVKDTrainer, TVKDConfig, folder, student(), settings=SAVING,
        teacher_model=model, teacher_processing_class=TOKENIZER, **options,
    )  # fmt: skip


def tvkd_with_lora(folder):
    return tvkd(folder, peft_config=LORA)


def drdo(folder, **options):
    return trainer(
        DRDOTrainer, DRDOConfig, folder, student(), settings=SAVING,
        train_dataset=dataset(**signal("reward")), **options,
    )  # fmt: skip


def drdo_with_lora(folder):
    return drdo(folder, peft_config=LORA)


@pytest.mark.parametrize("make", [tvkd, tvkd_with_lora, drdo, drdo_with_lora])
def test_the_same_trajectory(tmp_path, make):
    whole = make(tmp_path)
    expected = history(whole)
    resumed = make(tmp_path)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)  # whatever it is now, the checkpoint counts
    found = history(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # The totals of a resumed training, and TRL's count of tokens, are of the part that it did.
    for entry in expected:
        entry.pop("num_tokens", None)
    assert_same(found[:-1], expected[:-1])
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict())


def test_the_best_model_keeps_its_reward_head(tmp_path):
    settings = {
        **SAVING, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3,
        "metric_for_best_model": "eval_loss", "greater_is_better": True,  # so it is not the last
    }  # fmt: skip
    data = dataset(**signal("reward"))
    found = trainer(
        DRDOTrainer, DRDOConfig, tmp_path, student(), settings=settings,
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    found.train()
    assert found.state.best_model_checkpoint.endswith("checkpoint-3")
    best = found.evaluate()["eval_loss"]
    assert best == pytest.approx(found.state.best_metric, rel=1e-5)
