"""Columns of a teacher's distributions are those of full logits, whatever happens on the way."""

from __future__ import annotations

import pyarrow.parquet
import pytest
import torch
from closeness import assert_no_worse
from tiny_models import conversation, rows, tiny_model, tiny_tokenizer

from fastpref.ops import Head
from fastpref.ops.top_logps import top_logps
from fastpref.teacher import add_kd_cache, load_shaping
from fastpref.teacher.model import head_digest
from fastpref.teacher.store import note_of, read_settings

SIDES = ("chosen", "rejected")
TOKENIZER = tiny_tokenizer()
VOCABULARY = len(TOKENIZER)


@pytest.fixture
def teacher():
    """Wider than the student, and with more columns than there are tokens."""
    return tiny_model(TOKENIZER, seed=3, hidden_size=24, vocab_size=VOCABULARY + 8)


@pytest.fixture
def student():
    """With a bias on its head."""
    model = tiny_model(TOKENIZER, seed=1)
    model.lm_head = torch.nn.Linear(16, VOCABULARY)
    return model


@torch.no_grad()
def probabilities(model, row, side, dtype=torch.float64):
    """(T, V) the log-probabilities at every token of one response, from full logits."""
    prompt = TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = TOKENIZER.apply_chat_template(row["prompt"] + row[side])["input_ids"]
    logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1, :VOCABULARY]
    return logits.to(dtype).log_softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_means_are_those_of_full_logits(teacher, student, tmp_path, batch_size):
    found = add_kd_cache(
        rows(4), teacher, TOKENIZER, tmp_path / "a.parquet", student=student, batch_size=batch_size
    )
    weight, bias = student.lm_head.weight.detach(), student.lm_head.bias.detach()
    for row, one in zip(rows(4), found, strict=True):
        assert {key: one[key] for key in row} == row
        for side in SIDES:
            logps, plain = (
                probabilities(teacher, row, side, d) for d in (torch.double, torch.float32)
            )
            for name, matrix in (("weights", weight), ("biases", bias)):
                numbers = torch.tensor(one[f"{side}_teacher_{name}"])
                exact = logps.exp() @ matrix.double()
                assert_no_worse(numbers, plain.exp() @ matrix, exact, torch.float32)
            entropies = torch.tensor(one[f"{side}_teacher_entropies"])
            exact = -(logps.exp() * logps).sum(-1)
            assert_no_worse(entropies, -(plain.exp() * plain).sum(-1), exact, torch.float32)


def test_likeliest_tokens_are_those_of_full_logits(teacher, tmp_path):
    options = {"top_k": 5, "temperature": 2.0, "chosen_only": True}
    found = add_kd_cache(rows(3), teacher, TOKENIZER, tmp_path / "a.parquet", **options)
    assert not any(name.startswith("rejected_teacher") for name in found.column_names)
    for row, one in zip(rows(3), found, strict=True):
        logps = (probabilities(teacher, row, "chosen") / 2).log_softmax(-1)
        likeliest = logps.topk(5)
        assert one["chosen_teacher_token_ids"] == likeliest.indices.tolist()
        numbers = torch.tensor(one["chosen_teacher_token_logps"], dtype=torch.float64)
        torch.testing.assert_close(numbers, likeliest.values, rtol=1e-5, atol=1e-5)


def test_a_vocabulary_smaller_than_k():
    head = torch.randn(3, 4)
    tokens, logps = top_logps(torch.randn(5, 4), head, 7)
    assert tokens.shape == logps.shape == (5, 3)
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(5))
    assert top_logps(torch.randn(0, 4), head, 2)[0].shape == (0, 2)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=["means", "tokens"])
def test_stopped_and_continued_it_ends_in_the_same_file(
    teacher, student, tmp_path, monkeypatch, options
):
    options = {**options, "student": None if options else student, "batch_size": 2}
    whole, output = tmp_path / "whole.parquet", tmp_path / "stopped.parquet"
    add_kd_cache(rows(), teacher, TOKENIZER, whole, **options)
    forward, calls = teacher.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(teacher, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        add_kd_cache(rows(), teacher, TOKENIZER, output, **options)
    assert not output.exists()
    add_kd_cache(rows(), teacher, TOKENIZER, output, **options)
    assert len(calls) == 3 + 2  # four batches: two were done
    one, other = (pyarrow.parquet.read_table(file) for file in (whole, output))
    assert one.equals(other) and one.schema.equals(other.schema, check_metadata=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stopped.parquet", "whole.parquet"]


def test_many_rows_are_written_some_at_a_time(teacher, student, tmp_path, monkeypatch):
    whole = add_kd_cache(rows(), teacher, TOKENIZER, tmp_path / "a.parquet", student=student)
    monkeypatch.setattr("fastpref.teacher.precompute.BYTES_AT_ONCE", 2**12)
    pieces = add_kd_cache(rows(), teacher, TOKENIZER, tmp_path / "b.parquet", student=student)
    assert pieces.to_list() == whole.to_list()
    groups = [
        pyarrow.parquet.read_metadata(tmp_path / f"{name}.parquet").num_row_groups for name in "ab"
    ]
    assert groups[0] == 1 < groups[1]


def test_a_file_says_what_it_was_made_with(teacher, student, tmp_path):
    output = tmp_path / "a.parquet"
    add_kd_cache(rows(), teacher, TOKENIZER, output, student=student, temperature=2.0)
    settings = read_settings(output)
    assert settings["top_k"] is None and settings["vocab_size"] == VOCABULARY
    loaded = load_shaping(output, temperature=2.0).map(lambda row: {"x": 1}).shuffle(seed=0)
    note = note_of(loaded, "rejected_teacher_entropies")
    assert note == {name: settings[name] for name in note} and note["temperature"] == 2
    with pytest.raises(ValueError, match="other settings: .*another student's head"):
        other = tiny_model(TOKENIZER, seed=2)
        add_kd_cache(rows(), teacher, TOKENIZER, output, student=other, temperature=2.0)
    with pytest.raises(ValueError, match="other settings: .*top_k is None, not 4"):
        add_kd_cache(rows(), teacher, TOKENIZER, output, top_k=4, temperature=2.0)


def test_a_head_is_known_in_any_dtype(student):
    head = student.lm_head
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16())
    wide, narrow = Head(head.weight), Head(head.weight.bfloat16())
    assert head_digest(wide) == head_digest(narrow)
    assert head_digest(wide) != head_digest(Head(head.weight, head.bias))
    assert head_digest(wide) != head_digest(Head(head.weight * 1.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "student: expected the model that is trained, or None with top_k, .* got neither"),
        ({"student": "x", "top_k": 2}, "student: expected .* got both"),
        ({"top_k": 0}, "top_k: expected a number of tokens, at least 1, or None, got 0"),
        ({"top_k": 2, "temperature": 0.0}, "temperature: expected"),
        ({"top_k": 2, "batch_size": 0}, "batch_size: expected"),
        ({"top_k": 2, "teacher_tokenizer": tiny_tokenizer(20)},
         "teacher_tokenizer: expected the student's vocabulary, since it reads"),
    ],
)  # fmt: skip
def test_what_is_refused(teacher, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        add_kd_cache(rows(), teacher, TOKENIZER, tmp_path / "a.parquet", **options)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_are_refused(teacher, tmp_path):
    with torch.no_grad():
        teacher.model.embed_tokens.weight[TOKENIZER.convert_tokens_to_ids("x")] = torch.inf
    examples = [*rows(2), conversation("x", "sky", "rain")]
    with pytest.raises(ValueError, match=r"got NaN or infinity for rows \[2\]"):
        add_kd_cache(examples, teacher, TOKENIZER, tmp_path / "a.parquet", top_k=2)


def test_a_soft_cap_is_refused(teacher, student, tmp_path):
    student.config.final_logit_softcapping = 5.0
    with pytest.raises(ValueError, match="student: expected a head without a soft cap"):
        add_kd_cache(rows(), teacher, TOKENIZER, tmp_path / "a.parquet", student=student)
