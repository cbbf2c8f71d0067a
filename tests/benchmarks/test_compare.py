"""The comparison of methods runs on tiny models, and resumes where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import compare
import pytest
from students import forget_oldest_turns
from tiny_models import rows, tiny_model, tiny_tokenizer

COMPARE = Path(__file__).parents[2] / "benchmarks" / "compare"
pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(folder, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    tiny_model(tokenizer).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows(10))), "utf-8")
    options = {
        "dataset": folder / "pairs.jsonl",
        "student": folder / "model",
        "teacher": folder / "model",
        "student_layers": 1,
        "oracle_layers": 1,
        "max_pairs": 8,
        "held_out": 4,
        "sft_steps": 1,
        "seeds": 3,
        "work": folder / "work",
        "output": folder / "results" / "compare.json",
        **options,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["--config", str(COMPARE / "compare.yaml"), *given]


def test_it_resumes_where_it_was_stopped(tmp_path, capsys):
    argv = arguments(tmp_path)
    output = tmp_path / "results" / "compare.json"
    compare.main([*argv, "--methods", "DRDO", "SimPO"])
    first = json.loads(output.read_text("utf-8"))["runs"]
    report = compare.main(argv)
    assert report["runs"][:2] == first
    assert [run["method"] for run in report["runs"]] == ["DRDO", "SimPO", "TVKD", "DPO"]
    assert set(report["summary"]["DRDO"]["held_out"]) > {"implicit_accuracy", "head_margin"}
    assert output.with_suffix(".png").is_file()
    assert "standard error" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="of other settings"):
        compare.main([*argv, "--learning_rate", "1"])


def test_the_committed_results_are_of_the_committed_settings(tmp_path):
    argv = ["--config", str(COMPARE / "compare.yaml"), "--dataset", "preference_pairs.jsonl"]
    (args,) = compare.TrlParser(compare.Arguments).parse_args_and_config(
        [*argv, "--work", str(tmp_path)]
    )
    report = compare.begin_report(args, 86, 64)
    assert len(report["runs"]) == 12


def test_oldest_turns_are_forgotten():
    tokenizer = tiny_tokenizer()
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    options = {"tokenizer": tokenizer, "max_length": 1000}
    assert forget_oldest_turns({"prompt": turns}, **options)["prompt"] == turns
    options["max_length"] = 12
    assert forget_oldest_turns({"prompt": turns}, **options)["prompt"] == turns[2:]
    system = [{"role": "system", "content": "kind"}]
    assert (
        forget_oldest_turns({"prompt": system + turns}, **options)["prompt"] == system + turns[2:]
    )
