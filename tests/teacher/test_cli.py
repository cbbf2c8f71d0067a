"""The command says what it does, and what is wrong with its input, in a line."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_models import rows, tiny_model, tiny_tokenizer

import fastpref
from fastpref import cli
from fastpref.cli import main
from fastpref.teacher import load_shaping


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("teacher", "student")):
        tiny_model(tokenizer, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())), "utf-8")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastpref", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return command


VALUES = ("values", "--teacher", "teacher", "--dataset", "rows.jsonl", "--output", "out.parquet")
KD = ("kd-cache", *VALUES[1:], "--student", "student")


def test_it_writes_a_dataset(run, tmp_path):
    code, out, _ = run(*VALUES, "--gamma", "0.9", "--per-token")
    assert code == 0
    assert out == "out.parquet: 7 pairs with chosen_shaping and rejected_shaping\n"
    found = load_shaping(tmp_path / "out.parquet", gamma=0.9, per_token=True, model="teacher")
    assert len(found["chosen_values"]) == 7


def test_the_implicit_reward(run, tmp_path):
    code, _, _ = run(*VALUES, *IMPLICIT, "student", "--beta", "0.5", "--per-token")
    assert code == 0
    found = load_shaping(tmp_path / "out.parquet", reference_model="student", beta=0.5)
    for row in found:
        assert row["chosen_values"][0] == 0
        assert row["chosen_shaping"] == row["chosen_values"][-1] != 0


def test_what_was_left_out_is_said(run, tmp_path):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('\n{"prompt": "x", "chosen": 5, "rejected": "y"}\n')
    code, out, err = run(*VALUES, "--skip-bad-rows")
    assert code == 0 and "7 pairs" in out and "left out 1 rows: 7" in err


IMPLICIT = ("--potential", "implicit_reward", "--reference")
ERRORS = {
    "no such teacher": (["--teacher", "nowhere/at/all"], "teacher: expected a model folder"),
    "no such dataset": (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    "output of another kind": (["--output", "out.csv"], "output: expected"),
    "a bad row": (["--max-length", "5"], "7 bad rows: row 0: the prompt alone has"),
    "gamma": (["--gamma", "-1"], "gamma: expected"),
    "temperature": (["--temperature", "0"], "temperature: expected"),
    "batch size": (["--batch-size", "0"], "batch_size: expected"),
    "length": (["--max-length", "1"], "max_length: expected"),
    "NaN": (["--temperature", "nan"], "temperature: expected a finite number"),
    "no reference": (["--potential", "implicit_reward"], "reference: expected the teacher before"),
    "a reference": (["--reference", "student"], "reference: expected None with potential 'value'"),
    "itself": ([*IMPLICIT, "teacher"], "reference: expected another model than the teacher"),
    "no such reference": ([*IMPLICIT, "nowhere/at/all"], "reference: expected a model folder"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(run, name):
    arguments, message = ERRORS[name]
    code, out, _ = run(*VALUES, *arguments)
    assert isinstance(code, str)  # which Python prints, with exit code 1
    assert code.startswith("fastpref: ") and message in code and "\n" not in code
    assert not out


EARLY = ["gamma", "temperature", "batch size", "length", "NaN", "no reference", "itself"]


@pytest.mark.parametrize("name", EARLY)
def test_settings_are_refused_before_anything_is_loaded(run, monkeypatch, tmp_path, name):
    monkeypatch.setattr(cli, "read_rows", None)
    monkeypatch.setattr(cli, "load_teacher", None)
    arguments, message = ERRORS[name]
    code, _, _ = run(*VALUES, *arguments)
    assert message in code
    assert not list(tmp_path.glob("out*"))


def test_its_version(run):
    assert run("--version") == (0, f"{fastpref.__version__}\n", "")


def test_unknown_choices_are_refused_with_the_choices(run):
    code, _, err = run(*VALUES, "--potential", "luck")
    assert code == 2 and "'value', 'max', 'margin', 'expectation', 'implicit_reward'" in err


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_explains(run, arguments):
    _, out, err = run(*arguments)
    assert "values" in out + err and "kd-cache" in out + err


VALUES_OPTIONS = "teacher dataset output potential gamma reference beta max-length per-token"
KD_OPTIONS = "teacher student dataset output split top-k chosen-only temperature max-length dtype"


@pytest.mark.parametrize(
    ("command", "options"), [("values", VALUES_OPTIONS), ("kd-cache", KD_OPTIONS)]
)
def test_help_names_every_option(run, command, options):
    _, out, _ = run(command, "--help")
    for option in options.split():
        assert f"--{option}" in out


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        ((), "chosen_teacher_weights, chosen_teacher_entropies, rejected_teacher_weights, "
             "rejected_teacher_entropies"),
        (("--top-k", "3", "--chosen-only"), "chosen_teacher_token_ids, chosen_teacher_token_logps"),
    ],
)  # fmt: skip
def test_it_writes_distributions(run, tmp_path, arguments, columns):
    code, out, _ = run(*KD, *arguments)
    assert (code, out) == (0, f"out.parquet: 7 pairs with {columns}\n")
    assert load_shaping(tmp_path / "out.parquet")[columns.split(",")[0]][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "nowhere/at/all"], "student: expected a model folder"),
        (["--top-k", "0"], "top_k: expected a number of tokens"),
        (["--temperature", "0"], "temperature: expected"),
        (["--output", "out.csv"], "output: expected"),
    ],
)
def test_errors_of_distributions_are_one_line(run, arguments, message):
    code, out, _ = run(*KD, *arguments)
    assert code.startswith("fastpref: ") and message in code and "\n" not in code and not out
