"""Rows that cannot be used are named, and refused or left out."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict
from tiny_models import conversation, rows, tiny_model, tiny_tokenizer

from fastpref.data import collate_pairs
from fastpref.data.rows import row_defect
from fastpref.data.tokens import tokenize_rows
from fastpref.teacher import BadRowsError, add_shaping, load_shaping, read_rows
from fastpref.teacher.store import read_settings

GOOD = conversation("what is it", "the sky", "rain")
BAD = {
    "an empty response": ({**GOOD, "chosen": [{"role": "assistant", "content": " "}]}, "empty"),
    "an empty string": ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    "no messages": ({**GOOD, "rejected": []}, "rejected is empty"),
    "a missing column": ({k: v for k, v in GOOD.items() if k != "chosen"}, "chosen is missing"),
    "nothing": ({**GOOD, "rejected": None}, "rejected is missing"),
    "a number": ({**GOOD, "chosen": 7}, "got int"),
    "a number as content": (
        {**GOOD, "chosen": [{"role": "assistant", "content": 7}]},
        "content '7'",
    ),
    "no role": ({**GOOD, "chosen": [{"content": "x"}]}, "role and content"),
    "a prompt of another kind": ({**GOOD, "prompt": "what"}, "all be strings or all be lists"),
    "a prompt without messages": ({**GOOD, "prompt": []}, "prompt has no messages"),
    "too long": (conversation("what", "sky " * 300, "rain"), "the model reads 256"),
    "no object": ([1, 2], "got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name, tmp_path):
    row, reason = BAD[name]
    tokenizer = tiny_tokenizer()
    examples = [*rows(3), row, *rows(2)]
    with pytest.raises(BadRowsError, match=rf"1 bad row: row 3: .*{reason}"):
        add_shaping(examples, tiny_model(tokenizer), tokenizer, tmp_path / "out.parquet")
    assert not list(tmp_path.iterdir())


def test_bad_rows_of_a_file_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    examples = [*rows(1), BAD["a number"][0], {"chosen": "x", "rejected": "y"}, *rows(1)]
    file.write_text("\n".join(map(json.dumps, examples)), "utf-8")
    _, bad = tokenize_rows(
        read_rows(str(file)), tiny_tokenizer(), max_length=None, context_length=None
    )
    assert [row for row, _ in bad] == [1, 2]
    assert bad[1].reason == "prompt is missing"


def test_bad_rows_are_left_out_on_request(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    good = rows(5)
    examples = [good[0], BAD["a number"][0], *good[1:4], BAD["nothing"][0], good[4]]
    output = tmp_path / "out.parquet"
    found = add_shaping(examples, model, tokenizer, output, skip_bad_rows=True)
    expected = add_shaping(good, model, tokenizer, tmp_path / "good.parquet")
    assert found["chosen"] == expected["chosen"]
    assert found["chosen_shaping"] == expected["chosen_shaping"]
    assert read_settings(output)["skipped_rows"] == [1, 5]
    with pytest.raises(ValueError, match="skipped_rows"):
        load_shaping(output, skipped_rows=[])


def test_templates_that_refuse_a_row_spoil_that_row_only():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}" + tokenizer.chat_template
    )
    system = {**GOOD, "prompt": [{"role": "system", "content": "be kind"}, *GOOD["prompt"]]}
    pairs, bad = tokenize_rows([GOOD, system], tokenizer, max_length=None, context_length=None)
    assert len(pairs) == 1 and bad == [(1, "cannot be tokenized: no system role")]


def test_many_bad_rows_are_counted(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(BadRowsError, match="30 bad rows: row 1: .*and 20 more") as caught:
        add_shaping(
            [GOOD, *[BAD["nothing"][0]] * 30],
            tiny_model(tokenizer),
            tokenizer,
            tmp_path / "out.parquet",
        )
    assert len(caught.value.rows) == 30
    assert "skip_bad_rows" in str(caught.value)


def test_one_defect_of_all_rows_is_said_once(tmp_path):
    tokenizer = tiny_tokenizer()
    other = {"prompt": "x", "good": "y", "bad": "z"}
    reason = "all 4 rows: chosen is missing; their columns are prompt, good, bad"
    with pytest.raises(BadRowsError, match=f"^dataset: {reason}$"):
        add_shaping([other] * 4, tiny_model(tokenizer), tokenizer, tmp_path / "out.parquet")
    with pytest.raises(ValueError, match=f"^rows: {reason}. The first of them: "):
        collate_pairs([other] * 4, tokenizer)
    empty = {"prompt": "x", "chosen": " ", "rejected": "z"}
    with pytest.raises(ValueError, match=r"^rows: all 4 rows: chosen is empty\. The first"):
        collate_pairs([empty] * 4, tokenizer)
    with pytest.raises(BadRowsError, match=r"2 bad rows: row 0: .*; row 1: chosen is empty$"):
        add_shaping([other, empty], tiny_model(tokenizer), tokenizer, tmp_path / "out.parquet")


def test_no_rows_are_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="dataset: expected at least one"):
        add_shaping([], tiny_model(tokenizer), tokenizer, tmp_path / "out.parquet")


def test_several_splits_are_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    splits = DatasetDict(train=Dataset.from_list(rows()))
    with pytest.raises(ValueError, match="dataset: expected rows, or one split"):
        add_shaping(splits, tiny_model(tokenizer), tokenizer, tmp_path / "out.parquet")


def test_lines_that_are_no_json_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n{oops\n", "utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_rows(str(file))


def test_tool_calls_are_something_to_say():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    assert row_defect({**GOOD, "chosen": [call]}) is None
    assert row_defect(Dataset.from_list([GOOD])[0]) is None


def test_csv(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text('\ufeffprompt,chosen,rejected\n"2, and 2?","4\nit is",5\n', "utf-8")
    assert read_rows(str(file)) == [{"prompt": "2, and 2?", "chosen": "4\nit is", "rejected": "5"}]
    for wrong in ("a,b\n", "a,b,c,d\n", 'a,b,"c\n'):
        file.write_text("prompt,chosen,rejected\n" + wrong, "utf-8")
        with pytest.raises(ValueError, match=r"pairs\.csv: expected a CSV file, cannot read it"):
            read_rows(str(file))


@pytest.mark.parametrize("name", ["pairs.txt", "a/pairs.csv", "/nowhere/pairs", "./pairs", "a/b/c"])
def test_a_file_that_is_missing_is_not_looked_for_elsewhere(name):
    with pytest.raises(ValueError, match="dataset: expected a file that exists"):
        read_rows(name)
