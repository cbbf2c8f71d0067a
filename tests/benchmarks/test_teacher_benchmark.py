"""The benchmark of a teacher's values measures what it says."""

from __future__ import annotations

import json

import pytest
import teacher
import torch
from tiny_models import rows, tiny_model, tiny_tokenizer


def test_it_reports_cost_error_and_ranking(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(20))), "utf-8")
    teacher.main(str(tmp_path / "model"), tmp_path / "rows.jsonl", 7, tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["pairs"] == 20 and 5 <= report["compared_pairs"] <= 7
    assert report["largest_difference_from_full_logits"] < 1e-4 < report["largest_shaping"]
    assert 0 < report["head_seconds"] < report["seconds"]
    assert 4 <= report["bytes_a_response"] <= 64
    names = [row["reward"] for row in report["rows"]]
    assert names == ["value", "max", "margin", "expectation", "logit", "logp"]
    assert "chosen above rejected" in capsys.readouterr().out


def test_ranking_counts_margins_above_zero():
    row = teacher.rank("value", torch.tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 5.0], [3.0, 1.0]]))
    assert row.margin_accuracy == 0.5 and row.standard_error == pytest.approx(0.25)
    assert row.mean_margin == pytest.approx(-0.5)
