"""The command says what it does, and what is wrong with its input, in a line."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import torch
from tiny_models import rows, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

import fastpref
from fastpref import cli, sequence_rewards
from fastpref.cli import main
from fastpref.data import collate_pairs
from fastpref.models import add_reward_head
from fastpref.models.reward_head import saved_beside
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
    columns = "chosen_shaping, chosen_values, rejected_shaping, rejected_values"
    for was in ("", "was finished already, nothing was left to do: "):
        code, out, err = run(*VALUES, "--gamma", "0.9", "--per-token")
        assert code == 0
        assert out == f"out.parquet: {was}7 pairs with {columns}\n"
        assert "tokens: 100%" in err and "7/7" in err
    found = load_shaping(tmp_path / "out.parquet", gamma=0.9, per_token=True, model="teacher")
    assert len(found["chosen_values"]) == 7


def test_rewards(run, tmp_path, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(tmp_path / "teacher")
    add_reward_head(model)
    head = model.reward_head.weight.detach()
    with saved_beside({"weight": head}, tmp_path / "teacher"):
        pass
    code, out, _ = run("rewards", "--oracle", *VALUES[2:], "--batch-size", "3")
    assert (code, out) == (0, "out.parquet: 7 pairs with chosen_reward, rejected_reward\n")
    tokenizer = tiny_tokenizer()
    batch = collate_pairs(load_shaping(tmp_path / "out.parquet", model="teacher"), tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = model.model(**inputs).last_hidden_state
    wanted = sequence_rewards(states, batch["labels"], head)
    assert len(set(wanted.tolist())) > 7
    torch.testing.assert_close(batch["oracle_rewards"], wanted.detach())
    code, _, _ = run("rewards", "--oracle", "student", *VALUES[3:])
    assert "folder: expected a folder with reward_head.safetensors" in code


def test_stopped_it_says_how_to_go_on(run, monkeypatch):
    forward, calls = LlamaForCausalLM.forward, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", stopping)
    code, out, err = run(*VALUES, "--batch-size", "3")
    assert (code, out) == (130, "")
    assert err.endswith("stopped with 3 pairs done: the same command continues from there\n")
    code, _, err = run(*VALUES, "--batch-size", "1")
    assert (code, len(calls)) == (0, 2 + 4) and "43%" in err


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
    "no such teacher": (["--teacher", "nowhere/at/all"], "--teacher: expected a model folder"),
    "no such dataset": (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    "no such folder": (["--dataset", "/nowhere/pairs"], "--dataset: expected a file that exists"),
    "unknown kind": (
        ["--dataset", "pairs.txt"],
        "a file that ends in .jsonl, .json, .csv, .parquet",
    ),
    "a split of a file": (["--split", "test"], '--split: expected "train", since a file has no'),
    "output of another kind": (["--output", "out.csv"], "output: expected"),
    "a bad row": (["--max-length", "5"], "the prompt alone has 8 tokens, --max-length is 5; row 1"),
    "gamma": (["--gamma", "-1"], "--gamma: expected"),
    "temperature": (["--temperature", "0"], "temperature: expected"),
    "batch size": (["--batch-size", "0"], "--batch-size: expected"),
    "length": (["--max-length", "1"], "--max-length: expected"),
    "NaN": (["--temperature", "nan"], "temperature: expected a finite number"),
    "no reference": (["--potential", "implicit_reward"], "reference: expected the teacher before"),
    "a reference": (["--reference", "student"], "reference: expected None with potential 'value'"),
    "itself": ([*IMPLICIT, "teacher"], "reference: expected another model than the teacher"),
    "no such reference": ([*IMPLICIT, "nowhere/at/all"], "reference: expected a model folder"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(run, tmp_path, name):
    arguments, message = ERRORS[name]
    (tmp_path / "pairs.txt").touch()
    code, out, _ = run(*VALUES, *arguments)
    assert not list(tmp_path.glob("out*"))
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


def test_values_that_are_not_there_are_named(run):
    code, _, _ = run("inspect", "--values", "nofile.parquet", "--output", "report.html")
    assert code == "fastpref: --values: expected a file that exists, got nofile.parquet"


def test_unknown_choices_are_refused_with_the_choices(run):
    code, _, err = run(*VALUES, "--potential", "luck")
    assert code == 2 and "'value', 'max', 'margin', 'expectation', 'implicit_reward'" in err


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_explains(run, arguments):
    _, out, err = run(*arguments)
    assert all(one in out + err for one in ("values", "rewards", "kd-cache", "inspect"))


def test_help_cuts_no_summary_off(run):
    _, out, _ = run("--help")
    assert "..." not in out.partition("Commands:")[2]
    assert "Train a student by any method, like trl dpo." in out
    assert "Store a teacher's distributions for a dataset." in out


@pytest.mark.parametrize(("command", "extra"), [("train", "trl"), ("values", "teacher")])
def test_without_libraries_it_names_the_extra_of_the_command(monkeypatch, command, extra):
    monkeypatch.setattr("fastpref.extras.find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["fastpref", command])
    with pytest.raises(SystemExit, match=rf"pip install '\.\[{extra}\]'"):
        runpy.run_path(cli.__file__)


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
        (["--top-k", "0"], "--top-k: expected a number of tokens"),
        (["--temperature", "0"], "temperature: expected"),
        (["--output", "out.csv"], "output: expected"),
    ],
)
def test_errors_of_distributions_are_one_line(run, arguments, message):
    code, out, _ = run(*KD, *arguments)
    assert code.startswith("fastpref: ") and message in code and "\n" not in code and not out
