"""The code in docs/values.md runs as it stands, with a small teacher in the large one's place."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "values.md").read_text("utf-8")
TEACHER = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / TEACHER)
    tokenizer.save_pretrained(tmp_path / TEACHER)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows())), "utf-8")
    monkeypatch.chdir(tmp_path)


def test_python():
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(code, names)
    assert len(names["dataset"]["chosen_shaping"]) == len(rows())


def test_the_command(monkeypatch):
    (command,) = re.findall(r"^fastpref values .*$", PAGE, flags=re.MULTILINE)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and Path("pairs-with-values.parquet").is_file()
