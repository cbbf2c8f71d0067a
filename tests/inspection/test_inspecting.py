"""What is shown of a teacher is what training would use."""

from __future__ import annotations

import json
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looking import readable_tokenizer
from tiny_models import conversation, rows, tiny_model, tiny_tokenizer

from fastpref.data.tokens import TokenizedPair
from fastpref.inspection import inspect_teacher, inspect_values
from fastpref.inspection.pairs import shown_pair, spread, token_texts
from fastpref.models import head_states, lm_head_of
from fastpref.teacher import BadRowsError, action_rewards, add_shaping, teacher_shaping
from fastpref.teacher.actions import ACTION_REWARDS
from fastpref.teacher.precompute import pad_pairs, tokenize_rows
from fastpref.teacher.shaping import POTENTIALS

TOKENIZER = readable_tokenizer()
TEACHER, REFERENCE, STUDENT = (tiny_model(TOKENIZER, seed=seed) for seed in range(3))
ROWS = rows()
FOUND = inspect_teacher(
    ROWS, TEACHER, TOKENIZER, reference=REFERENCE, student=STUDENT, beta=0.3, batch_size=3
)


def in_one_batch(model):
    """What a model's head reads of all rows, and labels, by the functions of a training loop."""
    pairs, _ = tokenize_rows(ROWS, TOKENIZER, max_length=None, context_length=None)
    tokens, attention, labels = pad_pairs(pairs)
    with torch.no_grad():
        states = head_states(model, input_ids=tokens, attention_mask=attention)
    return states, lm_head_of(model), labels


def expected_sums():
    states, head, labels = in_one_batch(TEACHER)
    others, other_head, _ = in_one_batch(REFERENCE)
    sums = {one: teacher_shaping(states, head, labels, potential=one) for one in POTENTIALS}
    sums["implicit_reward"] = teacher_shaping(
        states, head, labels, potential="implicit_reward", beta=0.3,
        reference_hidden=others, reference_head=other_head,
    )  # fmt: skip
    return sums | {one: action_rewards(states, head, labels, reward=one) for one in ACTION_REWARDS}


def test_every_signal_is_the_one_that_training_gets():
    expected = expected_sums()
    assert [signal.name for signal in FOUND.signals] == list(expected)
    for signal in FOUND.signals:
        sums = expected[signal.name].view(2, -1).T.double()
        torch.testing.assert_close(signal.sums(), sums, rtol=1e-4, atol=1e-4)
        assert signal.meaning


def test_the_students_gap_is_beta_times_its_own():
    logps = action_rewards(*in_one_batch(STUDENT), reward="logp").double()
    chosen, rejected = logps.chunk(2)
    torch.testing.assert_close(FOUND.student_gaps, 0.3 * (chosen - rejected), rtol=1e-4, atol=1e-4)


def test_each_batch_goes_through_each_model_once():
    calls = []
    models = [tiny_model(TOKENIZER, seed=seed) for seed in range(3)]
    for name, model in zip("trs", models, strict=True):
        model.model.register_forward_hook(lambda *_, name=name: calls.append(name))
    teacher, reference, student = models
    inspect_teacher(ROWS, teacher, TOKENIZER, reference=reference, student=student, batch_size=4)
    assert sorted(calls) == ["r", "r", "s", "s", "t", "t"]


def test_tokens_and_curves_go_together():
    for index, pair in enumerate(FOUND.pairs):
        row = ROWS[pair.row]
        for side, texts in enumerate((pair.chosen, pair.rejected)):
            content = row[("chosen", "rejected")[side]][0]["content"]
            assert "".join(texts).strip() == f"{content}</s>"
            for signal in FOUND.signals:
                assert len(signal.curves[index][side]) == len(texts) + 1
        assert row["prompt"][0]["content"] in pair.prompt


@pytest.mark.parametrize(
    "options",
    [
        {}, {"potential": "max"}, {"gamma": 0.9}, {"gamma": 0.9, "terminal": "zero"},
        {"form": "next_value", "gamma": 0.5},
        {"potential": "implicit_reward", "reference": REFERENCE, "beta": 0.2},
    ],
)  # fmt: skip
def test_files_have_the_shaping_that_they_were_made_with(tmp_path, options):
    file = tmp_path / "values.parquet"
    columns = add_shaping(ROWS, TEACHER, TOKENIZER, file, per_token=True, **options)
    found = inspect_values(file, TOKENIZER, student=STUDENT, beta=0.3)
    expected = torch.tensor([columns["chosen_shaping"], columns["rejected_shaping"]]).T.double()
    torch.testing.assert_close(found.signals[0].sums(), expected, rtol=1e-5, atol=1e-4)
    assert found.pairs == FOUND.pairs
    torch.testing.assert_close(found.student_gaps, FOUND.student_gaps, rtol=1e-4, atol=1e-4)


def test_several_files_of_the_same_rows(tmp_path):
    files = [tmp_path / f"{number}.parquet" for number in range(4)]
    add_shaping(ROWS, TEACHER, TOKENIZER, files[0], per_token=True)
    add_shaping(ROWS, TEACHER, TOKENIZER, files[1], per_token=True, gamma=0.9, potential="max")
    add_shaping(ROWS[1:], TEACHER, TOKENIZER, files[2], per_token=True)
    add_shaping(ROWS, TEACHER, TOKENIZER, files[3])
    found = inspect_values(files[:2], TOKENIZER, pairs=3)
    assert [one.name for one in found.measures] == ["value", "max, gamma=0.9"]
    assert [pair.row for pair in found.pairs] == [0, 2, 4]
    for wrong, message in [
        ([files[0], files[2]], "made with other settings: other rows"),
        ([files[0], files[0]], "files of different potentials or settings"),
        ([files[3]], "--per-token"),
        ([], "at least one file"),
        ([tmp_path / "nothing.parquet"], "files: expected files that exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            inspect_values(wrong, TOKENIZER)
    with pytest.raises(ValueError, match="another tokenizer"):
        inspect_values(files[0], tiny_tokenizer(20))


def test_bad_rows_are_named_or_left_out():
    bad = [*ROWS[:3], {"prompt": "x", "chosen": 5, "rejected": "y"}, *ROWS[3:]]
    with pytest.raises(BadRowsError, match="row 3: chosen must be"):
        inspect_teacher(bad, TEACHER, TOKENIZER)
    found = inspect_teacher(bad, TEACHER, TOKENIZER, skip_bad_rows=True)
    assert [pair.row for pair in found.pairs] == [0, 1, 2, 4, 5, 6, 7]
    assert found.facts["left out"] == "1 rows: 3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: expected"),
        ({"pairs": 1}, "pairs: expected"),
        ({"batch_size": True}, "batch_size: expected"),
        ({"max_length": 1}, "max_length: expected"),
        ({"reference": TEACHER}, "reference: expected"),
        ({"reference": REFERENCE, "reference_tokenizer": tiny_tokenizer(20)},
         "reference_tokenizer: expected the teacher's vocabulary"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        inspect_teacher(ROWS, TEACHER, TOKENIZER, **options)


def test_rows_that_the_student_cannot_read(tmp_path):
    long = conversation("what", "blue " * 60, "green")
    add_shaping([*ROWS, long], TEACHER, TOKENIZER, tmp_path / "values.parquet", per_token=True)
    student = tiny_model(TOKENIZER, max_position_embeddings=64)
    options = {"student": student, "beta": 0.3}
    with pytest.raises(BadRowsError, match="row 7: .* tokens, the model reads 64"):
        inspect_values(tmp_path / "values.parquet", TOKENIZER, **options)
    found = inspect_values(tmp_path / "values.parquet", TOKENIZER, skip_bad_rows=True, **options)
    assert found.pairs == FOUND.pairs


def test_one_pair_is_too_few():
    with pytest.raises(ValueError, match="at least two preference pairs, got 1"):
        inspect_teacher(ROWS[:1], TEACHER, TOKENIZER)


@given(st.integers(1, 60), st.integers(1, 60))
def test_rows_are_spread_over_all(length, count):
    places = spread(length, count)
    assert len(places) == min(length, count) == len(set(places))
    gaps = [after - before for before, after in zip(places, [*places[1:], length], strict=True)]
    assert places[0] == 0 and max(gaps) - min(gaps) <= 1


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.text("ab é🙂", max_size=9)
)
def test_texts_of_tokens_make_the_whole(before, text):
    """Characters of several tokens, too, which none of them has alone."""
    ids = TOKENIZER(before)["input_ids"], TOKENIZER(text)["input_ids"]
    texts = token_texts(TOKENIZER, *ids)
    assert "".join(texts) == text and len(texts) == len(ids[1])


def test_a_first_token_that_nothing_precedes_is_not_shown():
    ids = TOKENIZER("the sky is blue")["input_ids"]
    pair = TokenizedPair(0, array("i"), array("i", ids), array("i", ids[:3]))
    found = shown_pair(pair, TOKENIZER, (len(ids) - 1, 2))
    assert "".join(found.chosen) == TOKENIZER.decode(ids[1:]) and len(found.rejected) == 2


def test_it_is_read_as_one_reads_json(tmp_path):
    file = tmp_path / "rows.jsonl"
    hostile = conversation("</script>\u2028", "'\"><img src=x>", "{{ 7 * 7 }} \0 🙂")
    file.write_text("\n".join(map(json.dumps, [hostile, *ROWS])), "utf-8")
    found = inspect_teacher(str(file), TEACHER, TOKENIZER)
    assert "".join(found.pairs[0].rejected).strip() == "{{ 7 * 7 }} \0 🙂</s>"
