"""The loop of accelerate trains as a plain loop does on the same pairs."""

from __future__ import annotations

import re
import shlex

import accelerate_loop
import pytest
import torch
from datasets import Dataset
from pages import ROOT, blocks
from tiny_models import rows, tiny_model, tiny_tokenizer

import fastpref
from fastpref.cli import main
from fastpref.models import head_states, lm_head_of

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def student(tmp_path, monkeypatch):
    """A folder; the working one has pairs with a shaping."""
    monkeypatch.chdir(tmp_path)
    tiny_model(TOKENIZER).save_pretrained("student")
    TOKENIZER.save_pretrained("student")
    pairs = [
        {**row, "chosen_shaping": 0.1 * index, "rejected_shaping": -0.1}
        for index, row in enumerate(rows(8))
    ]
    Dataset.from_list(pairs).to_parquet("pairs-with-values.parquet")
    return pairs


def test_accumulated_steps_are_those_of_all_their_pairs(student):
    options = "--student student --cpu --output_dir out --learning_rate 1e-3"
    history = accelerate_loop.main(shlex.split(options))
    assert len(history) == 2  # 8 pairs, 2 a batch, 2 batches a step
    model = tiny_model(TOKENIZER).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, logged in enumerate(history):
        batch = fastpref.collate_pairs(student[4 * step : 4 * step + 4], TOKENIZER)
        labels, shaping = batch.pop("labels"), batch.pop("shaping")
        states = head_states(model, **batch)[:, :-1]
        out = fastpref.tvkd_loss(states, lm_head_of(model), labels, shaping, beta=0.01, alpha=0.7)
        margins = out.chosen_rewards - out.rejected_rewards
        expected = [out.loss.detach(), margins.mean(), (margins > 0).float().mean()]
        assert [*logged.values()] == pytest.approx([float(one) for one in expected], rel=1e-4)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_commands_of_the_page(tmp_path, monkeypatch, student):
    """The teacher's values and the loop, with tiny models and a launcher that starts no other."""
    values, launch = blocks("docs/recipes.md", "sh", "accelerate")[0].splitlines()
    tiny = re.sub(r"meta-llama/\S+", "student", values).replace("pairs.jsonl", "pairs.parquet")
    Dataset.from_list(rows(4)).to_parquet("pairs.parquet")
    (tmp_path / "pairs-with-values.parquet").unlink()
    monkeypatch.setattr("sys.argv", shlex.split(tiny))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    launcher, script, *options = shlex.split(re.sub(r"meta-llama/\S+", "student", launch))[1:]
    assert launcher == "launch" and (ROOT / script).is_file()
    assert len(accelerate_loop.main([*options, "--cpu", "--output_dir", "out"])) == 1
