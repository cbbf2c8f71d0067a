"""``fastpref train``: TRL's options and ours, a trained model, a table, a plot."""

from __future__ import annotations

import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from pages import blocks, commands
from tiny_models import rows, tiny_model
from training import TOKENIZER
from transformers import AutoModelForCausalLM, training_args

from fastpref.cli import main
from fastpref.data import read_rows
from fastpref.integrations.trl import command, command_report

PAGE = "docs/trainers.md"
(YAML,) = blocks(PAGE, "yaml")
COMMANDS = [line[1:] for line in commands(PAGE, "fastpref") if line[1] == "train"]
STUDENT, TEACHER = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
SMALL = shlex.split(
    "--use_cpu --bf16 false --max_steps 2 --logging_steps 1 --per_device_train_batch_size 2 "
    "--report_to none --disable_tqdm true --save_strategy no --learning_rate 1e-3"
)
SIMPO = shlex.split(f"train --method simpo --model_name_or_path {STUDENT} --output_dir out")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, typed):
    for seed, name in enumerate((STUDENT, TEACHER)):
        tiny_model(TOKENIZER, seed=seed).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    lines = "\n".join(map(json.dumps, rows()))
    (tmp_path / "pairs.jsonl").write_text(lines, "utf-8")
    (tmp_path / "both").mkdir()
    for split in ("train", "test"):
        (tmp_path / "both" / f"{split}.jsonl").write_text(lines, "utf-8")
    (tmp_path / "run.yaml").write_text(YAML, "utf-8")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    return typed


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that commands made."""
    made: list = []
    make = command._trainer
    monkeypatch.setattr(command, "_trainer", lambda *one: made.append(make(*one)) or made[-1])
    return made


def test_the_page(run, trainers):
    for line, folder in zip(COMMANDS[:2], ("student-tvkd", "student-mixed"), strict=True):
        code, out = run(*line, *SMALL)
        assert code == 0
        assert f"{folder}: the model" in out
        saved = AutoModelForCausalLM.from_pretrained(folder)
        before = AutoModelForCausalLM.from_pretrained(STUDENT)
        assert not saved.lm_head.weight.equal(before.lm_head.weight)
        assert Path(folder, "training.png").is_file() == bool(find_spec("matplotlib"))
        logged = [row for row in trainers[-1].state.log_history if "loss" in row]
        assert [row["step"] for row in logged] == [1, 2]
        first, last = (f"{row['loss']:.4g}" for row in logged)
        assert re.search(rf"loss +│ {first} +│ {last} +│ 1 to 2", out)
    tvkd, mixed = (one.args for one in trainers)
    assert (tvkd.methods, tvkd.alpha, tvkd.beta) == ({"tvkd": 1.0}, 0.7, 0.01)
    assert tvkd.learning_rate == 1e-3  # the command line comes before the file
    assert mixed.methods == {"tvkd": 1.0, "sft": 0.1}
    assert any("shaping/chosen" in row for row in trainers[0].state.log_history)


def test_drdo_in_two_stages_with_lora_and_evaluation(run, trainers, monkeypatch):
    monkeypatch.setattr(command_report, "find_spec", lambda _: None)  # without a plot
    both = ["--model_name_or_path", STUDENT, "--dataset_name", "both", *SMALL]
    assert run("train", "--method", "oracle", "--output_dir", "oracle", *both)[0] == 0
    options = "--oracle_model_name_or_path oracle --use_peft --eval_strategy steps --eval_steps 1"
    code, out = run(
        *("train", "--method", "drdo", "--output_dir", "student"), *shlex.split(options), *both
    )
    assert code == 0 and re.search(r"eval_rewards/margins +│.*│ 1 to 2", out)
    assert [list(one.args.methods) for one in trainers] == [["oracle"], ["drdo"]]
    assert Path("student/adapter_model.safetensors").is_file()
    assert Path("student/reward_head.safetensors").is_file()


def test_help_has_our_options_first(run):
    code, out = run("train", "--help")
    assert code == 0 and len(out.splitlines()) < 200
    titles = ["method and what it reads", "model and adapters", "trainer, the most used"]
    places = [out.index(f"\n{title}:") for title in titles]
    assert places == sorted(places)
    ours, model, trainers = out[: places[1]], out[places[1] : places[2]], out[places[2] :]
    for name in ("alpha", "teacher_model_name_or_path", "oracle_model_name_or_path"):
        assert f"--{name} " in ours
    assert "--use_peft " in model and "--learning_rate " in trainers
    assert "weight_decay" in trainers and "loss_type" not in out


def test_help_of_a_method_has_its_options_only(run):
    code, out = run(*COMMANDS[2])
    assert code == 0 and "--terminal " in out and "--jsd_beta " not in out
    assert "In brackets" not in out


def test_what_was_not_logged_is_not_in_the_table(capsys, tmp_path, monkeypatch):
    history = [
        {"step": 1, "loss": 2.0, "rewards/margins": 0.25},
        {"step": 2, "eval_loss": 1.5},
        {"step": 3, "loss": 1.0, "rewards/margins": 0.5},
        {"step": 3, "train_loss": 1.5},
    ]
    monkeypatch.setattr(command_report, "find_spec", lambda _: None)
    command_report.report(history, tmp_path)
    out = re.sub(" +", " ", capsys.readouterr().out)
    assert "│ loss │ 2 │ 1 │ 1 to 3 │" in out and "│ eval_loss │ 1.5 │ 1.5 │ 2 to 2 │" in out
    assert "accuracies" not in out and "png" not in out
    command_report.report([], tmp_path)
    assert capsys.readouterr().out.startswith("no loss was logged: --logging_steps")


ERRORS = {
    "no model": (
        "--model_name_or_path nowhere/at/all",
        "--model_name_or_path: expected a model folder or a name on the Hub, got 'nowhere/at/all'",
    ),
    "no such name": (
        "--model_name_or_path nosuchmodel --teacher_model_name_or_path nosuchteacher",
        "--model_name_or_path: expected a model folder or a name on the Hub, got 'nosuchmodel' (",
    ),
    "no dataset": ("--dataset_name nowhere.jsonl", "--dataset_name: expected a file that exists"),
    "no split": (
        "--dataset_train_split x",
        '--dataset_train_split: expected "train", since a file',
    ),
    "a file has one split": ("--eval_strategy steps --eval_steps 1", "--eval_strategy: expected"),
    "unknown method": ("--method x", "argument --method: invalid choice"),
    "help of no method": ("--help --method x", "--method: expected 'adpa' or"),
    "unknown option": (
        "--learningrate 1 --bf16 true --use_cpu false",
        "--learningrate: no such option; did you mean --learning_rate?",
    ),
    "like no option": ("--qqqq=1", "--qqqq: no such option; see fastpref train --method METHOD"),
    "no option": ("x", "'x': expected options, --NAME VALUE"),
    "unknown in a file": (
        "--config unknown.yaml",
        "unknown.yaml: learningrate: no such option; did you mean learning_rate?",
    ),
    "no bfloat16": (
        "--bf16 true --use_cpu false",
        "--bf16: this machine has no device that computes in bfloat16; "
        "add --use_cpu true --bf16 false",
    ),
    "no number": ("--beta x", "argument --beta: invalid float value"),
    "out of range": ("--beta -1", "--beta: expected"),
    "of another method": ("--alpha 0.5", "--alpha: expected"),
    "no teacher": ("--method vanilla_kd", "--teacher_model_name_or_path: expected a model"),
    "a teacher too many": (
        f"--teacher_model_name_or_path {TEACHER}",
        "--teacher_model_name_or_path: expected None",
    ),
    "a teacher beside columns": (
        "--method tvkd --dataset_name shaped.jsonl --teacher_model_name_or_path nosuchteacher",
        "--teacher_model_name_or_path: expected None, since the train dataset has chosen_shaping "
        "and rejected_shaping already (leave it out)",
    ),
    "a bad row": ("--dataset_name bad.jsonl", "--dataset_name: 1 bad row: row 7: chosen must be"),
    "other columns": (
        "--dataset_name other.jsonl",
        "--dataset_name: all 7 rows: chosen is missing; their columns are prompt, good, rejected",
    ),
    "other columns of a table": (
        "--dataset_name other.parquet",
        "--dataset_name: all 7 rows: chosen is missing; their columns are prompt, good, rejected",
    ),
    "a mixed column": ("--dataset_name mixed.jsonl", "--dataset_name: expected one type"),
    "no rows": ("--dataset_name empty.jsonl", "--dataset_name: expected rows"),
    "no file": (
        "--config nowhere.yaml",
        "--config: expected a file that exists, got nowhere.yaml",
    ),
    "no YAML": ("--config bad.yaml", "--config: expected a YAML file"),
    "no options": ("--config list.yaml", "--config: expected a YAML file with a line"),
    "nothing": ("--config", "--config: expected a YAML file"),
    "debug": ("--ignore_bias_buffers", "--ignore_bias_buffers: expected False"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(run, name, monkeypatch):
    options, message = ERRORS[name]
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for the Hub
    lines = Path("pairs.jsonl").read_text("utf-8")
    bad = '{"prompt": "x", "chosen": 5, "rejected": "y"}'
    Path("bad.jsonl").write_text(f"{lines}\n{bad}", "utf-8")
    mixed = [json.dumps({**row, "note": note}) for row, note in zip(rows(2), "a1", strict=True)]
    Path("mixed.jsonl").write_text("\n".join(mixed).replace('"1"', "1"), "utf-8")
    Path("empty.jsonl").touch()
    shaping = {"chosen_shaping": 1.0, "rejected_shaping": 0.0}
    Path("shaped.jsonl").write_text("\n".join(json.dumps(row | shaping) for row in rows()))
    Path("other.jsonl").write_text(lines.replace('"chosen"', '"good"'), "utf-8")
    Dataset.from_list(read_rows("other.jsonl")).to_parquet("other.parquet")
    for file, text in (("bad", "a: ["), ("unknown", "learningrate: 1"), ("list", "- 1")):
        Path(f"{file}.yaml").write_text(text, "utf-8")
    code, _ = run(*SIMPO, *SMALL, "--dataset_name", "pairs.jsonl", *shlex.split(options))
    assert isinstance(code, str)  # which Python prints, with exit code 1
    assert code.startswith("fastpref: ") and message in code and "\n" not in code


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model_name_or_path", "--model_name_or_path: required: a model folder or a name on the"),
        ("dataset_name", "--dataset_name: required: a file of preference pairs, a saved"),
        ("method", "--method: required: one or several of adpa, "),
    ],
)
def test_what_has_to_be_named(run, missing, message):
    given = {"method": "simpo", "model_name_or_path": STUDENT, "dataset_name": "pairs.jsonl"}
    del given[missing]
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    code, _ = run("train", "--output_dir", "out", *SMALL, *options)
    assert str(code).startswith(f"fastpref: {message}")


def test_nothing_named(run):
    assert run("train")[0] == run("train", "--seed", "1")[0]
    assert run("train")[0] == (
        "fastpref: --method, --model_name_or_path and --dataset_name: required; "
        "see fastpref train --method METHOD --help"
    )


@pytest.mark.usefixtures("run")
def test_stopped_while_it_loads(monkeypatch, capsys):
    def stopping(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "PreferenceTrainer", stopping)
    monkeypatch.setattr(sys, "argv", ["fastpref", *SIMPO, *SMALL, "--dataset_name", "pairs.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("stopped before the first step\n")


@pytest.mark.parametrize(
    ("save", "kept"),
    [
        ("no", "nothing was saved"),
        (
            "steps",
            "the last checkpoint is out/checkpoint-1: "
            "add --resume_from_checkpoint out/checkpoint-1",
        ),
    ],
)
@pytest.mark.usefixtures("run")
def test_stopped_it_says_what_was_saved(monkeypatch, capsys, save, kept):
    step, calls = command.PreferenceTrainer.training_step, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(command.PreferenceTrainer, "training_step", stopping)
    saving = ("--dataset_name", "pairs.jsonl", "--save_strategy", save, "--save_steps", "1")
    monkeypatch.setattr(sys, "argv", ["fastpref", *SIMPO, *SMALL, *saving])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(f"stopped after step 1 of 2; {kept}\n")
