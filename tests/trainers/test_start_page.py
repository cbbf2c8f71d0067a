"""The code in docs/start.md runs from top to bottom, with tiny models for those of the package."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import formulas
import pytest
import torch
from pages import blocks, commands
from tiny_models import rows, tiny_model
from training import SETTINGS, TOKENIZER

import fastpref.integrations.trl
from fastpref.cli import main

PAGE = "docs/start.md"
SMALL = "--max_steps 1 --use_cpu --report_to none --disable_tqdm true --save_strategy no".split()


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("smollm2-4-layers", "smollm2")):
        tiny_model(TOKENIZER, seed=seed).save_pretrained(f"examples/outputs/{name}")
        TOKENIZER.save_pretrained(f"examples/outputs/{name}")
    Path("examples/pairs.jsonl").write_text("\n".join(map(json.dumps, rows(4))), "utf-8")

    call, others, loop, trainer = blocks(PAGE)
    names: dict = {}
    exec(call, names)
    given = (names[name] for name in ("hidden", "head", "labels", "shaping"))
    expected = formulas.tvkd_loss(*given, beta=0.01)
    torch.testing.assert_close(names["out"].loss, expected)
    assert names["out"].loss.item() == pytest.approx(1.10, abs=0.005)  # as the page says
    assert names["out"].chosen_logps.round().tolist() == [-107, -118]
    exec(others, names)
    assert names["logps"].shape == (4, 6) and names["out"].loss.isfinite()
    exec(loop, names)
    assert names["student"].lm_head.weight.grad.any()

    trl = fastpref.integrations.trl
    small = functools.partial(trl.TVKDConfig, **SETTINGS)
    monkeypatch.setattr(trl, "TVKDConfig", small)
    exec(trainer, names)
    assert names["trainer"].state.global_step == 5

    for command in commands(PAGE, "fastpref"):
        monkeypatch.setattr(sys, "argv", command + (SMALL if command[1] == "train" else []))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, ended.value.code
    for student in ("student-tvkd", "student-command", "student-from-values"):
        assert Path("examples/outputs", student, "model.safetensors").is_file()
    assert "`value`" in capsys.readouterr().out
    assert "</html>" in Path("examples/outputs/report.html").read_text("utf-8")
