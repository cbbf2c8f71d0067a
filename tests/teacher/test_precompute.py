"""A dataset's shaping is what full logits give, and files say what they were made with."""

from __future__ import annotations

import json
import shutil

import formulas
import pytest
import torch
from counting import flops_of
from datasets import Dataset
from tiny_models import conversation, rows, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

import fastpref
from fastpref.data.tokens import tokenize_rows
from fastpref.models.lm_head import lm_head_of
from fastpref.teacher import add_shaping, load_shaping, load_teacher
from fastpref.teacher.precompute import plan, read_states
from fastpref.teacher.shaping_columns import ShapingOptions, shape_batch
from fastpref.teacher.store import FinishedBatches, read_settings

SIDES = ("chosen", "rejected")


@pytest.fixture
def teacher():
    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer), tokenizer


@torch.no_grad()
def naive_values(model, tokenizer, row: dict, side: str) -> list[float]:
    """V(s_0) ... V(s_T) of one response from full logits, one sequence at a time."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]
    logits = model(torch.tensor([whole])).logits[0]
    return torch.logsumexp(logits.double(), -1)[len(prompt) - 1 :].tolist()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_shaping_is_that_of_full_logits(teacher, tmp_path, batch_size, gamma):
    model, tokenizer = teacher
    found = add_shaping(
        rows(), model, tokenizer, tmp_path / "a.parquet", batch_size=batch_size, gamma=gamma
    )
    every = add_shaping(
        rows(),
        model,
        tokenizer,
        tmp_path / "b.parquet",
        batch_size=batch_size,
        gamma=gamma,
        per_token=True,
    )
    for row, one, other in zip(rows(), found, every, strict=True):
        for side in SIDES:
            values = naive_values(model, tokenizer, row, side)
            shaping = sum(
                gamma * after - before for before, after in zip(values, values[1:], strict=False)
            )
            assert one[f"{side}_shaping"] == pytest.approx(shaping, rel=1e-4, abs=1e-4)
            assert other[f"{side}_shaping"] == pytest.approx(shaping, rel=1e-4, abs=1e-4)
            assert other[f"{side}_values"] == pytest.approx(values, rel=1e-5)
        assert {key: one[key] for key in row} == row


def test_other_columns_stay_and_old_shaping_is_replaced(teacher, tmp_path):
    dataset = Dataset.from_list(
        [{**row, "id": i, "chosen_shaping": 99.0} for i, row in enumerate(rows())]
    )
    found = add_shaping(dataset.select([4, 2, 6]), *teacher, tmp_path / "out.parquet")
    expected = add_shaping(rows(), *teacher, tmp_path / "all.parquet")
    assert found["id"] == [4, 2, 6]
    assert found["chosen_shaping"] == pytest.approx(
        [expected[i]["chosen_shaping"] for i in (4, 2, 6)], rel=1e-4
    )


@pytest.mark.parametrize("potential", ["max", "margin", "expectation"])
def test_every_potential_can_be_precomputed(teacher, tmp_path, potential):
    model, tokenizer = teacher
    options = {"potential": potential, "per_token": True, "temperature": 2.0}
    found = add_shaping(rows(2), model, tokenizer, tmp_path / "out.parquet", **options)
    whole = tokenizer.apply_chat_template(rows(2)[1]["prompt"] + rows(2)[1]["chosen"])["input_ids"]
    logits = model(torch.tensor([whole])).logits[0].double()
    probabilities = (logits / 2).softmax(-1)
    top = probabilities.topk(2).values
    potentials = {
        "max": top[:, 0],
        "margin": top[:, 0] - top[:, 1],
        "expectation": (probabilities * logits).sum(-1),
    }[potential]
    values = found[1]["chosen_values"]
    assert values == pytest.approx(potentials[-len(values) :].tolist(), rel=1e-4, abs=1e-5)
    assert found[1]["chosen_shaping"] == pytest.approx(values[-1] - values[0], abs=1e-4)


def test_the_head_is_read_twice_a_response(teacher):
    """With gamma 1 the head costs two rows a response, however long it is."""
    model, tokenizer = teacher
    head = lm_head_of(model)
    vocabulary, width = head.weight.shape
    flops = {}
    for words in (3, 30):
        row = conversation("what is it", "sky " * words, "rain " * words)
        pairs, _ = tokenize_rows([row], tokenizer, max_length=None, context_length=None)
        states, labels = read_states(model, head, pairs, check=False)
        flops[words] = flops_of(
            lambda s=states, n=labels: shape_batch(
                s, head, n, options=ShapingOptions(), per_token=False
            )
        )
    rows_read = 2 * 2  # two states of each of two responses
    assert flops[3] == flops[30] == rows_read * 2 * vocabulary * width


def test_a_file_says_what_it_was_made_with(teacher, tmp_path):
    output = tmp_path / "out.parquet"
    made = add_shaping(rows(), *teacher, output, gamma=0.5)
    settings = read_settings(output)
    assert settings["gamma"] == 0.5 and settings["dtype"] == "float32"
    assert settings["chat_template"] == teacher[1].chat_template
    assert load_shaping(output, gamma=0.5, potential="value")["chosen_shaping"] == list(
        made["chosen_shaping"]
    )
    with pytest.raises(ValueError, match=r"other settings: gamma is 0\.5, not 1\.0"):
        load_shaping(output, gamma=1.0)
    with pytest.raises(ValueError, match="colour is None"):
        load_shaping(output, colour="blue")
    Dataset.from_list(rows()).to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="without settings"):
        load_shaping(tmp_path / "plain.parquet")


OTHERS = {
    "gamma is 1.0, not 0.5": lambda model, tokenizer: (rows(), model, tokenizer, {"gamma": 0.5}),
    "max_length is None": lambda model, tokenizer: (rows(), model, tokenizer, {"max_length": 30}),
    "another teacher": lambda _, tokenizer: (rows(), tiny_model(tokenizer, seed=1), tokenizer, {}),
    "other rows": lambda model, tokenizer: (rows()[::-1], model, tokenizer, {}),
    "another tokenizer": lambda model, tokenizer: (rows(), model, tiny_tokenizer(20), {}),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
@pytest.mark.parametrize("name", OTHERS)
def test_results_of_other_settings_are_refused(teacher, tmp_path, name, finished):
    output = tmp_path / "out.parquet"
    add_shaping(rows(), *teacher, output)
    if not finished:
        FinishedBatches(output).start(read_settings(output))
        output.unlink()
    examples, model, tokenizer, options = OTHERS[name](*teacher)
    with pytest.raises(ValueError, match=f"made with other settings: .*{name}"):
        add_shaping(examples, model, tokenizer, output, **options)


def test_a_finished_output_has_the_columns_of_its_dataset(teacher, tmp_path):
    output = tmp_path / "out.parquet"
    add_shaping([{**row, "source": "a"} for row in rows()], *teacher, output)
    with pytest.raises(ValueError, match="other columns beside the responses"):
        add_shaping([{**row, "source": "b"} for row in rows()], *teacher, output)


def test_finished_output_is_not_computed_again(teacher, tmp_path, monkeypatch):
    output = tmp_path / "out.parquet"
    first = add_shaping(rows(), *teacher, output)
    FinishedBatches(output).start(read_settings(output))  # killed between writing and tidying up
    monkeypatch.setattr(teacher[0], "forward", None)
    again = add_shaping(rows(), *teacher, output)
    assert again["chosen_shaping"] == list(first["chosen_shaping"])
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("batch_size", [2, 1, 3])
def test_batches_that_are_done_are_kept(teacher, tmp_path, monkeypatch, batch_size):
    """Out of memory, smaller batches go on with what larger ones have done."""
    model, tokenizer = teacher
    whole = add_shaping(rows(), model, tokenizer, tmp_path / "whole.parquet", batch_size=2)
    output = tmp_path / "out.parquet"
    forward, calls = model.forward, []

    def failing(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]) // 2)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        add_shaping(rows(), model, tokenizer, output, batch_size=2)
    assert not output.exists()
    resumed = add_shaping(rows(), model, tokenizer, output, batch_size=batch_size)
    assert calls[:3] == [2, 2, 2] and sum(calls[3:]) == 3  # seven pairs: four were done
    if batch_size == 2:
        assert resumed.to_list() == whole.to_list()
    for column in ("chosen_shaping", "rejected_shaping"):
        assert resumed[column][:] == pytest.approx(whole[column][:], abs=1e-5)


def test_any_source_of_rows_will_do(teacher, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())), "utf-8")
    sources = [rows(), Dataset.from_list(rows()), iter(rows()), tmp_path / "rows.jsonl"]
    found = [
        add_shaping(source, *teacher, tmp_path / f"{i}.parquet")["rejected_shaping"][:]
        for i, source in enumerate(sources)
    ]
    assert all(numbers == found[0] for numbers in found)


def test_a_model_in_pieces_gives_the_same_numbers(teacher, tmp_path):
    """Sharded over devices: here a layer is read from disk whenever it is needed."""
    model, tokenizer = teacher
    whole = add_shaping(rows(), model, tokenizer, tmp_path / "whole.parquet")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    pieces = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in pieces.parameters()} == {"cpu", "meta"}
    found = add_shaping(rows(), pieces, tokenizer, tmp_path / "pieces.parquet")
    assert found["chosen_shaping"] == list(whole["chosen_shaping"])
    loaded, _ = load_teacher(str(tmp_path / "model"), device_map="cpu")
    again = add_shaping(rows(), loaded, tokenizer, tmp_path / "loaded.parquet")
    assert again["chosen_shaping"] == list(whole["chosen_shaping"])


def test_values_that_are_not_finite_are_refused(teacher, tmp_path):
    model, tokenizer = teacher
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("x")] = torch.inf
    examples = [*rows(2), conversation("x", "sky", "rain")]
    with pytest.raises(ValueError, match=r"got NaN or infinity for rows \[2\]"):
        add_shaping(examples, model, tokenizer, tmp_path / "out.parquet")


def test_batches_are_of_like_lengths(teacher):
    pairs, _ = tokenize_rows(rows(12), teacher[1], max_length=None, context_length=None)
    batches = plan(pairs, 5)
    lengths = [pair.length() for batch in batches for pair in batch]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2
    assert sorted(pair.row for batch in batches for pair in batch) == list(range(12))
    assert [len(batch) for batch in batches] == [5, 5, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 1}, "max_length"),
        ({"gamma": -1.0}, "gamma"),
        ({"potential": "luck"}, "potential"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_out_of_range_are_refused(teacher, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        add_shaping(rows(), *teacher, tmp_path / "out.parquet", **options)
    assert not (tmp_path / "out.parquet").exists()


def test_other_file_kinds_are_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"output: .*\.parquet"):
        add_shaping(rows(), *teacher, tmp_path / "out.json")


def test_student_and_teacher_have_tokenizers_of_their_own(teacher, tmp_path):
    """A teacher's number a response serves a student with other tokens and another template."""
    dataset = add_shaping(rows(4), *teacher, tmp_path / "out.parquet")
    tokenizer = tiny_tokenizer(vocab_size=20)
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "")
    student = tiny_model(tokenizer, seed=3, hidden_size=8)
    pairs, _ = tokenize_rows(dataset, tokenizer, max_length=None, context_length=None)
    theirs, _ = tokenize_rows(dataset, teacher[1], max_length=None, context_length=None)
    assert all(
        len(one.chosen) != len(other.chosen) for one, other in zip(pairs, theirs, strict=True)
    )

    shaping = torch.tensor(dataset["chosen_shaping"][:] + dataset["rejected_shaping"][:])
    states, labels = read_states(student, lm_head_of(student), pairs, check=True)
    weight = student.lm_head.weight
    loss = fastpref.tvkd_loss(states[:, :-1], weight, labels, shaping).loss
    expected = formulas.tvkd_loss(states[:, :-1], weight, labels, shaping)
    expected = expected.loss if hasattr(expected, "loss") else expected
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path):
    yield
    assert not list(tmp_path.glob("*.tmp"))
    shutil.rmtree(tmp_path)
