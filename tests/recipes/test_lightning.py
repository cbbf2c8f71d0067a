"""Lightning trains the page's module as plain PyTorch does."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from pages import blocks
from pairs import pairs_with_shaping, sgd_step, tvkd
from recipes_page import needs
from tiny_models import tiny_model, tiny_tokenizer

import fastpref

needs("lightning")
import lightning  # noqa: E402  # after the skip

MODULE, FIT = blocks("docs/recipes.md", section="Lightning")
TOKENIZER = tiny_tokenizer()


@pytest.mark.filterwarnings("default")  # Lightning's advice: workers, a GPU, where it logs
def test_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = pairs_with_shaping(8)
    Dataset.from_list(pairs).to_parquet("pairs-with-values.parquet")
    settings = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False,
                "enable_checkpointing": False}  # fmt: skip
    trainer = lightning.Trainer
    monkeypatch.setattr(lightning, "Trainer", lambda **given: trainer(**given, **settings))
    student = tiny_model(TOKENIZER)
    names = {"student": student, "tokenizer": TOKENIZER}
    exec(MODULE, names)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    monkeypatch.setattr(names["TVKDModule"], "configure_optimizers", configure_optimizers)
    exec(FIT, names)
    assert names["trainer"].global_step == 2  # 8 pairs, 2 a batch, 2 batches a step
    plain = tiny_model(TOKENIZER)
    for start in (0, 4):
        batch = fastpref.collate_pairs(pairs[start : start + 4], TOKENIZER)
        sgd_step(plain, batch, 1.0, beta=0.01, alpha=0.7)
    for name, value in plain.named_parameters():
        found = student.state_dict()[name]
        torch.testing.assert_close(found, value.detach(), rtol=1e-4, atol=1e-5, msg=name)
    logged = names["trainer"].callback_metrics
    batch = fastpref.collate_pairs(pairs, TOKENIZER)
    with torch.no_grad():
        out = tvkd(plain, batch, beta=0.01, alpha=0.7)
    margin = float((out.chosen_rewards - out.rejected_rewards).mean())
    assert float(logged["eval_rewards/margins"]) == pytest.approx(margin, rel=1e-3)
