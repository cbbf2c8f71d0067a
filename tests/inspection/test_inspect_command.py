"""The command prints verdicts, writes the page, and says in a line what is wrong."""

from __future__ import annotations

import json

import pytest
from pages import blocks, commands
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref import cli

OUTPUT = ("--output", "report.html")
TEACHER = ("--teacher", "teacher", "--dataset", "rows.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("teacher", "student", "reference")):
        tiny_model(tokenizer, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())), "utf-8")
    return folder


@pytest.fixture
def run(monkeypatch, folder, typed):
    monkeypatch.chdir(folder)
    return typed


def test_a_teacher(run, folder):
    options = ("--reference", "reference", "--student", "student", "--pairs", "4")
    code, out = run("inspect", *TEACHER, *OUTPUT, *options)
    assert code == 0
    for name in ("value", "max", "margin", "expectation", "implicit_reward", "logit", "logp"):
        assert f"this teacher's `{name}`" in out.replace("This", "this")
    assert "of 4 pairs" in out and "report.html: the numbers, plots and 4 pairs" in out
    page = (folder / "report.html").read_text("utf-8")
    assert all(f"<dd>{name}</dd>" in page for name in ("teacher", "reference", "student", "0.1"))


def test_a_file(run, folder):
    code, _ = run("values", *TEACHER, "--output", "values.parquet", "--per-token")
    assert code == 0
    code, out = run("inspect", "--values", "values.parquet", *OUTPUT)
    assert code == 0 and "`value`" in out and "`max`" not in out


def test_the_page_in_docs(run, folder):
    """Its commands and its code, with small models for large ones."""
    for line in commands("docs/inspect.md", "fastpref"):
        names = {"meta-llama/Llama-3.1-8B-Instruct": "teacher", "my-dpo-model": "teacher",
                 "my-sft-model": "reference", "my-student": "student", "pairs.jsonl": "rows.jsonl",
                 "values.parquet": "docs.parquet"}  # fmt: skip
        code, out = run(*(names.get(word, word) for word in line[1:]))
        assert code == 0, code
    (python,) = blocks("docs/inspect.md")
    names = {"my-dpo-model": "teacher", "pairs.jsonl": "rows.jsonl", "report.html": "docs.html"}
    for name, small in names.items():
        python = python.replace(f'"{name}"', f'"{small}"')
    exec(python, {})
    assert "</html>" in (folder / "docs.html").read_text("utf-8")


def test_help_names_every_option(run):
    _, out = run("inspect", "--help")
    options = "teacher dataset values reference student beta pairs split max-length batch-size"
    for option in [*options.split(), "skip-bad-rows", "dtype", "device-map", "output"]:
        assert f"--{option}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "teacher: expected --teacher (or --values with a file), got none"),
        (("--teacher", "teacher"), "dataset: expected --dataset"),
        (("--values", "v.parquet", "--dataset", "d"), "dataset: expected none with --values"),
        (("--values", "v.parquet", "--reference", "d"), "reference: expected none with --values"),
        (("--values", "v.parquet", "--max-length", "9"), "--max-length: expected none"),
        (("--values", "v.parquet", "--split", "test"), "split: expected none with --values"),
        ((*TEACHER, "--output", "report.pdf"), "output: expected a file name that ends in .html"),
        ((*TEACHER, "--pairs", "1"), "pairs: expected a number of pairs, at least 2"),
        ((*TEACHER, "--beta", "0"), "beta: expected"),
    ],
)
def test_errors_are_one_line_before_anything_is_loaded(run, monkeypatch, arguments, message):
    monkeypatch.setattr(cli, "read_rows", None)
    monkeypatch.setattr(cli, "load_teacher", None)
    code, out = run("inspect", *OUTPUT, *arguments)
    assert isinstance(code, str) and code.startswith("fastpref: ") and message in code
    assert "\n" not in code and not out
