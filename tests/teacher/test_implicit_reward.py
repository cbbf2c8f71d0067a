"""The implicit reward as a potential: of tensors, of a dataset, and what is refused."""

from __future__ import annotations

import math

import formulas
import pytest
import torch
from batches import DTYPES, batches, hold_difference, hold_equal
from closeness import assert_no_worse
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref import Head, linear_logps, sum_responses, teacher_shaping
from fastpref.sequences import running_sum
from fastpref.teacher import add_shaping, load_shaping
from fastpref.teacher.store import FinishedBatches, read_settings

IMPLICIT = {"potential": "implicit_reward"}
OPTIONS = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([1.0, 0.9, 0.0]),
        "terminal": st.sampled_from(["bootstrap", "zero"]),
        "form": st.sampled_from(["difference", "next_value"]),
        "beta": st.sampled_from([0.1, 2.0]),
    }
)
LABELS = torch.tensor([[-100, 0, 1, -100, 1], [1, 1, -100, -100, -100]])  # one with a gap


def arguments(batch, dtype, reference):
    """Of `teacher_shaping`, padded: the batch's own model, and another one beside it."""
    leaves = batch.leaves(dtype, set(), **reference)
    names = ("ref_states", "ref_weight")
    states, weight = (leaves.pop(name) for name in names)
    return {
        "hidden": leaves["states"],
        "head": batch.head(leaves),
        "labels": batch.labels,
        "reference_hidden": states,
        "reference_head": Head(weight, softcap=20.0),
        "temperature": batch.temperature,
        "ignore_index": batch.ignore_index,
        **IMPLICIT,
    }


def another_model(batch, width):
    return {
        "ref_states": batch.normal(*batch.states.shape[:2], width),
        "ref_weight": batch.normal(len(batch.weight), width),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(batch=batches(), options=OPTIONS, compact=st.booleans(), width=st.sampled_from([1, 5]))
def test_it_equals_the_reference(dtype, batch, options, compact, width):
    reference = another_model(batch, width)
    found = teacher_shaping(**arguments(batch, dtype, reference), compact=compact, **options)
    plain, exact = (
        formulas.teacher_shaping(**arguments(batch, one, reference), **options)
        for one in (dtype, torch.float64)
    )
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    given_ = arguments(batch, torch.float64, reference)
    values = formulas.implicit_rewards(
        (given_["hidden"], given_["head"]),
        (given_["reference_hidden"], given_["reference_head"]),
        batch.labels,
        **{name: given_[name] for name in ("temperature", "ignore_index")},
        beta=options["beta"],
    )
    hold_difference(found, plain, exact, dtype, float(values.abs().sum(1).max()))


@settings(max_examples=25)
@given(batch=batches(), options=OPTIONS, compact=st.booleans())
def test_packed_equals_padded(batch, options, compact):
    padded = arguments(batch, torch.float64, another_model(batch, 5))
    packed = padded | {
        "hidden": batch.pack(padded["hidden"]),
        "reference_hidden": batch.pack(padded["reference_hidden"]),
        "labels": batch.packed_labels(),
        "cu_seqlens": batch.cu_seqlens(),
    }
    found, expected = (
        {"shaping": teacher_shaping(**one, compact=compact, **options)} for one in (packed, padded)
    )
    hold_equal(found, expected)


@settings(max_examples=25)
@given(batch=batches())
def test_undiscounted_it_is_the_implicit_reward_of_the_response(batch):
    given_ = arguments(batch, torch.float64, another_model(batch, 5))
    options = {name: given_[name] for name in ("temperature", "ignore_index")}
    targets = torch.nn.functional.pad(batch.labels, (0, 1), value=batch.ignore_index)
    logps, reference_logps = (
        sum_responses(
            linear_logps(given_[states], given_[head], targets, **options),
            targets,
            ignore_index=batch.ignore_index,
        ).logps
        for states, head in (("hidden", "head"), ("reference_hidden", "reference_head"))
    )
    found = teacher_shaping(**given_, beta=0.3)
    hold_equal({"shaping": found}, {"shaping": 0.3 * (logps - reference_logps)})
    ended = teacher_shaping(**given_, terminal="zero")
    torch.testing.assert_close(ended, torch.zeros_like(ended), rtol=0, atol=1e-12)
    same = {"reference_hidden": given_["hidden"], "reference_head": given_["head"]}
    assert not teacher_shaping(**given_ | same, gamma=0.9).any()


def two_token_models():
    """States whose logits are (z, 0): the teacher's z are 0..5, the reference's 0."""
    z = torch.arange(6.0).expand(2, 6)
    states = torch.stack([z, torch.zeros_like(z)], -1)
    return {
        "hidden": states,
        "head": torch.eye(2),
        "reference_hidden": torch.zeros(2, 6, 3),
        "reference_head": torch.ones(2, 3),
    }


# log p(1) - log 1/2 at states 0 to 5; of token 0 it is z more.
GAIN = [math.log(2) - math.log1p(math.exp(z)) for z in range(6)]
A, B, C = GAIN[1] + 1, GAIN[2], GAIN[4]  # of the first response's tokens
D, E = GAIN[:2]  # of the second's


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({}, A + B + C, D + E),
        ({"terminal": "zero"}, 0, 0),
        ({"gamma": 0.5}, 0.5 * A + 0.5 * (A + B) - A + 0.5 * (A + B + C) - (A + B), 0.5 * E),
        ({"form": "next_value"}, A + (A + B), D),
        ({"gamma": 2, "terminal": "zero"}, 2 * A + 2 * (A + B) - A - (A + B), D),
    ],
    ids=str,
)
def test_what_the_formula_says(options, first, second):
    found = teacher_shaping(**two_token_models(), labels=LABELS, beta=0.25, **IMPLICIT, **options)
    assert found.tolist() == pytest.approx([0.25 * first, 0.25 * second], abs=1e-6)


def test_temperature_is_that_of_both():
    models = two_token_models()
    halved = models | {"hidden": models["hidden"] / 2, "reference_hidden": torch.randn(2, 6, 3)}
    whole = halved | {name: 2 * halved[name] for name in ("hidden", "reference_hidden")}
    found = teacher_shaping(**whole, labels=LABELS, temperature=2.0, **IMPLICIT)
    expected = teacher_shaping(**halved, labels=LABELS, **IMPLICIT)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def packed_form(labels, **states):
    sequences, length = labels.shape
    with_last = torch.nn.functional.pad(labels, (0, 1), value=-100)
    return {
        **{name: one.flatten(0, 1) for name, one in states.items()},
        "labels": with_last.flatten(),
        "cu_seqlens": torch.arange(sequences + 1) * (length + 1),
    }


def test_long_responses_add_up_as_exactly_as_plain_ones():
    labels = torch.randint(9, (2, 3000))
    states = {name: torch.randn(2, 3001, 4) for name in ("hidden", "reference_hidden")}
    heads = {name: torch.randn(9, 4) for name in ("head", "reference_head")}
    options = {**IMPLICIT, "gamma": 0.999, "beta": 1.0}
    wide = {name: one.double() for name, one in (states | heads).items()}
    exact = formulas.teacher_shaping(**wide, labels=labels, **options)
    plain = formulas.teacher_shaping(**states, **heads, labels=labels, **options)
    padded = teacher_shaping(**states, **heads, labels=labels, **options)
    packed = teacher_shaping(**packed_form(labels, **states), **heads, **options)
    assert_no_worse(padded, plain, exact, torch.float32)
    assert_no_worse(packed, plain, exact, torch.float32)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("terminal", ["bootstrap", "zero"])
@pytest.mark.parametrize("vocab_sizes", [(2, 3), (3, 2)], ids=["teacher", "reference"])
def test_a_label_that_one_of_them_lacks(packed, terminal, vocab_sizes):
    """Its response is NaN where nobody waits, and no other is."""
    models = two_token_models()
    states = {name: models[name] for name in ("hidden", "reference_hidden")}
    heads = {
        name: torch.randn(size, states[of].shape[-1])
        for name, of, size in zip(("head", "reference_head"), states, vocab_sizes, strict=True)
    }
    labels = LABELS.clone()
    labels[0, 4] = 2  # the last of the response: the next state does not count with "zero"
    given_ = packed_form(labels, **states) if packed else {**states, "labels": labels}
    with pytest.raises(ValueError, match="labels: expected"):
        teacher_shaping(**given_, **heads, terminal=terminal, **IMPLICIT)
    found = teacher_shaping(**given_, **heads, terminal=terminal, compact=False, **IMPLICIT)
    assert found.isnan().tolist() == [True, False]


def test_wrong_boundaries_of_single_positions():
    models = two_token_models()
    states = {name: models.pop(name)[0, :2] for name in ("hidden", "reference_hidden")}
    found = teacher_shaping(
        **states, **models, labels=torch.full((2,), -100), cu_seqlens=torch.tensor([2, 1, 0]),
        compact=False, **IMPLICIT,
    )  # fmt: skip
    assert found.isnan().all()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_tokens_that_a_model_masks(packed):
    """What the teacher never says is worth minus infinity, and nothing to the other response."""
    models = two_token_models()
    head = Head(models.pop("head"), torch.tensor([-math.inf, 0.0]))
    labels = LABELS.clone()
    labels[0, 4] = -100  # one run
    given_ = {name: models.pop(name) for name in ("hidden", "reference_hidden")}
    given_ = packed_form(labels, **given_) if packed else {**given_, "labels": labels}
    found = teacher_shaping(head=head, **given_, **models, **IMPLICIT)
    assert found[0] == -math.inf
    assert found[1].item() == pytest.approx(0.1 * 2 * math.log(2))


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_sums_of_packed_sequences(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(length, generator=generator).double() for length in lengths]
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    expected = torch.cat([one.cumsum(0) - one for one in parts])
    found = running_sum(torch.cat(parts), boundaries)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_hidden": None}, "reference_hidden: expected that .* 'implicit_reward', got N"),
        (
            {"reference_head": None},
            "reference_head: expected that of the reference, with pot",
        ),
        ({"potential": "value"}, "reference_hidden: expected None with potential 'value', got Te"),
        ({"potential": "max", "reference_hidden": None}, "reference_head: expected None with pote"),
        ({"reference_hidden": torch.zeros(2, 5, 3)}, r"reference_hidden: expected shape \(2, 6, H"),
        ({"reference_head": torch.ones(2, 4)}, "reference_weight: expected"),
        ({"reference_head": torch.ones(2, 3).half()}, "reference_weight: expected"),
        ({"reference_head": "head"}, "reference_head: expected a Head"),
        ({"beta": 0.0}, "beta: expected a finite number above 0"),
        ({"beta": math.nan}, "beta: expected a finite number"),
        ({"temperature": 0.0}, "^temperature: expected"),
        ({"potential": "reward"}, "potential: expected 'value' or .* or 'implicit_reward'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        teacher_shaping(**{**two_token_models(), "labels": LABELS, **IMPLICIT, **options})


@pytest.fixture
def models():
    """Teacher, its tokenizer, and a reference that is narrower."""
    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer), tokenizer, tiny_model(tokenizer, seed=1, hidden_size=8)


@torch.no_grad()
def naive_log_ratios(models, row, side, temperature):
    """Of the tokens of one response, from full logits."""
    teacher, tokenizer, reference = models
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]
    tokens = torch.tensor(whole[len(prompt) :])
    logps = [
        (model(torch.tensor([whole])).logits[0].double() / temperature)
        .log_softmax(-1)[len(prompt) - 1 : -1]
        .gather(1, tokens.unsqueeze(1))
        .squeeze(1)
        for model in (teacher, reference)
    ]
    return logps[0] - logps[1]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_dataset(models, tmp_path, per_token, gamma):
    teacher, tokenizer, reference = models
    found = add_shaping(
        rows(5), teacher, tokenizer, tmp_path / "out.parquet", **IMPLICIT,
        reference=reference.train(), reference_tokenizer=tiny_tokenizer(), beta=0.5,
        temperature=2.0, gamma=gamma, per_token=per_token, batch_size=2,
    )  # fmt: skip
    for row, one in zip(rows(5), found, strict=True):
        for side in ("chosen", "rejected"):
            gains = 0.5 * naive_log_ratios(models, row, side, 2.0)
            values = torch.nn.functional.pad(gains.cumsum(0), (1, 0))
            shaping = (gamma * values[1:] - values[:-1]).sum().item()
            assert one[f"{side}_shaping"] == pytest.approx(shaping, rel=1e-4, abs=1e-4)
            if per_token:
                kept = one[f"{side}_values"]
                assert kept == pytest.approx(values.tolist(), rel=1e-4, abs=1e-4)
    assert not reference.training


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_another_reference_or_beta_is_refused(models, tmp_path, finished):
    teacher, tokenizer, reference = models
    output = tmp_path / "out.parquet"
    add_shaping(rows(2), teacher, tokenizer, output, reference=reference, **IMPLICIT)
    assert len(load_shaping(output, beta=0.1, reference_dtype="float32")) == 2
    if not finished:
        FinishedBatches(output).start(read_settings(output))
        output.unlink()
    other = tiny_model(tokenizer, seed=2, hidden_size=8)
    for options, name in (
        ({"reference": other, **IMPLICIT}, "another reference"),
        ({"reference": reference, "beta": 0.2, **IMPLICIT}, "beta is 0.1, not 0.2"),
        ({}, "potential is 'implicit_reward', not 'value'"),
    ):
        with pytest.raises(ValueError, match=f"made with other settings: .*{name}"):
            add_shaping(rows(2), teacher, tokenizer, output, **options)


def test_settings_of_other_potentials_are_what_they_were(models, tmp_path):
    """Else a precompute that was stopped before this potential came could not go on."""
    add_shaping(rows(2), *models[:2], tmp_path / "out.parquet")
    settings_ = read_settings(tmp_path / "out.parquet")
    assert not any(name == "beta" or name.startswith("reference") for name in settings_)


def test_references_that_are_refused(models, tmp_path):
    teacher, tokenizer, reference = models
    for options, message in (
        (IMPLICIT, "reference: expected the teacher before .*, got None"),
        ({"reference": reference}, "reference: expected None with potential 'value', got a model"),
        ({**IMPLICIT, "reference": teacher}, "reference: expected another model than the teacher"),
        ({**IMPLICIT, "reference": reference, "beta": -1.0}, "beta: expected"),
        (
            {**IMPLICIT, "reference": reference, "reference_tokenizer": tiny_tokenizer(20)},
            "reference_tokenizer: expected the teacher's vocabulary, since it reads the teacher's",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            add_shaping(rows(2), teacher, tokenizer, tmp_path / "out.parquet", **options)


def test_the_shorter_context_counts(models, tmp_path):
    teacher, tokenizer, _ = models
    reference = tiny_model(tokenizer, seed=1, max_position_embeddings=12)
    with pytest.raises(ValueError, match="all 2 rows: .*12"):
        add_shaping(
            rows(2), teacher, tokenizer, tmp_path / "out.parquet", reference=reference, **IMPLICIT
        )
