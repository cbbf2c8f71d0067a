"""TVKD by TRL's DPOTrainer: the same gradients, from a dataset's columns."""

from __future__ import annotations

import torch
import trl
from closeness import assert_no_worse
from datasets import Dataset
from pages import blocks
from tiny_models import rows, tiny_model, tiny_tokenizer
from trl_trainer import needs_trls_trainer

import fastpref
from fastpref.models import head_states, lm_head_of

COLUMNS, TRAINER = blocks("docs/recipes.md", section="TVKD in a trainer that only knows DPO")
TOKENIZER = tiny_tokenizer()
TOKENIZER.pad_token = "<unk>"


@needs_trls_trainer
def test_dpo_with_these_columns_is_tvkd(tmp_path, monkeypatch, caplog):
    pairs = [
        {**row, "chosen_shaping": 0.3 * index, "rejected_shaping": -0.01 * index}
        for index, row in enumerate(rows(4))
    ]
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 4, "max_steps": 1, "save_strategy": "no",
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant",
        "max_grad_norm": 0, "gradient_checkpointing": False, "padding_free": True,
    }  # fmt: skip
    config = trl.DPOConfig
    monkeypatch.setattr(trl, "DPOConfig", lambda _, **given: config(tmp_path, **given | settings))
    student = tiny_model(TOKENIZER)
    before = {name: value.clone() for name, value in student.named_parameters()}
    names = {"student": student, "tokenizer": TOKENIZER}
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(pairs).to_parquet("pairs-with-values.parquet")
    exec(COLUMNS, names)
    batch = fastpref.collate_pairs(pairs, TOKENIZER)
    steps = {}
    for dtype in (torch.float64, torch.float32):
        model = tiny_model(TOKENIZER).to(dtype)
        states = head_states(
            model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
        head, labels = lm_head_of(model), batch["labels"]
        options = {"beta": names["beta"], "alpha": names["alpha"]}
        fastpref.tvkd_loss(
            states[:, :-1], head, labels, batch["shaping"], **options
        ).loss.backward()
        steps[dtype] = torch.cat([one.grad.flatten() for one in model.parameters()])
    exec(TRAINER, names)
    trained = names["trainer"].model.named_parameters()
    found = torch.cat([(before[name] - value.detach()).flatten() for name, value in trained])
    # A step is a difference of weights: what they are rounded by is not the recipe's.
    rounding = torch.cat([value.flatten() for value in before.values()]).abs().max()
    assert_no_worse(
        *(torch.cat([one.double(), rounding.double().view(1)])
          for one in (found, steps[torch.float32], steps[torch.float64])),
        torch.float32,
    )  # fmt: skip
    assert steps[torch.float64].norm() > 1e-3
    assert "padding_free=True` is temporarily unavailable" in caplog.text  # TRL pads: the page
