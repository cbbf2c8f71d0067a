"""Columns of `fastpref kd-cache` train what the teacher itself would."""

from __future__ import annotations

import pytest
import torch
from counting import flops_of
from datasets import Dataset
from test_against_logits import batch_of
from tiny_models import conversation
from training import TOKENIZER, dataset, history, student, teacher, trainer

from fastpref.integrations.trl import PreferenceConfig, PreferenceTrainer
from fastpref.teacher import add_kd_cache

VOCABULARY = len(TOKENIZER)
# As many as there are: the divergence is that of the whole vocabulary.
ALL = {"top_k": VOCABULARY}
GKD = {"method": "gkd", "lmbda": 0.0, "divergence": "forward_kl"}


def frozen(**options):
    model = student(**options)
    model.lm_head.weight.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Datasets by their columns: of means, of the chosen ones', of tokens."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {
        "means": {"student": student()},
        "chosen means": {"student": student(), "chosen_only": True},
        "cool means": {"student": student(), "temperature": 2.0},
        "short means": {"student": student(), "max_length": 16},
        "tokens": {"top_k": 4},
        "all tokens": ALL,
    }
    return {
        name: add_kd_cache(dataset(), teacher(), TOKENIZER, folder / f"{name}.parquet", **options)
        for name, options in made.items()
    }


def train(folder, data, model=None, *, method="dckd", settings=None, **options):
    settings = {"method": method, "train_sampling_strategy": "sequential", **(settings or {})}
    classes = PreferenceTrainer, PreferenceConfig
    return trainer(
        *classes, folder, model or frozen(), settings=settings, train_dataset=data, **options
    )


def with_teacher(folder, model, data=None, **options):
    models = {"teacher_model": teacher(), "teacher_processing_class": TOKENIZER}
    return train(folder, data or dataset(), model, **models | options)


def assert_same_step(found, expected):
    """Loss, metrics and gradients of a batch."""
    losses = []
    for one in (found, expected):
        losses.append(one.compute_loss(one.model, dict(batch_of(one))))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for name, values in expected._metrics["train"].items():
        assert found._metrics["train"][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    ours, theirs = (dict(one.model.named_parameters()) for one in (found, expected))
    for name, other in theirs.items():
        assert (other.grad is None) == (ours[name].grad is None)
        if other.grad is not None:
            torch.testing.assert_close(ours[name].grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ("means", {"method": "dckd"}),
        ("chosen means", {"method": "vanilla_kd", "sft_weight": 0.5}),
        ("means", {"method": ["simpo", "vanilla_kd"]}),
        ("cool means", {**GKD, "divergence_temperature": 2.0}),
        ("short means", {"method": "dckd", "max_length": 16}),
        ("all tokens", {"method": "dckd", "topk_tail": "drop"}),
        ("all tokens", {**GKD, "topk_tail": "renormalize"}),
    ],
    ids=str,
)
def test_a_step_is_that_with_the_teacher(tmp_path, pairs, columns, settings):
    found = train(tmp_path / "found", pairs[columns], settings=settings)
    of_teacher = {name: value for name, value in settings.items() if name != "topk_tail"}
    assert found.readers == []
    assert_same_step(found, with_teacher(tmp_path / "expected", frozen(), settings=of_teacher))


def test_a_stream(tmp_path, pairs):
    stream = pairs["means"].to_iterable_dataset()
    found = train(tmp_path / "found", stream, settings={"max_steps": 8})
    assert_same_step(found, with_teacher(tmp_path / "expected", frozen()))


def test_a_head_that_trains_reads_tokens(tmp_path, pairs):
    settings = {"topk_tail": "drop"}
    found = train(tmp_path / "found", pairs["all tokens"], student(), settings=settings)
    assert_same_step(found, with_teacher(tmp_path / "expected", student()))


def test_rows_that_trl_drops(tmp_path):
    """Those whose prompt fills max_length."""
    long = conversation("sky " * 60, "sky", "rain")
    rows = Dataset.from_list([*dataset(3), long, *dataset(5)])
    data = add_kd_cache(rows, teacher(), TOKENIZER, tmp_path / "a.parquet", student=student())
    settings = {"max_length": 60, "per_device_train_batch_size": 8}
    found = train(tmp_path / "found", data, settings=settings)
    assert len(found.train_dataset) == 8
    expected = with_teacher(tmp_path / "expected", frozen(), data=rows, settings=settings)
    assert_same_step(found, expected)


def test_a_teacher_with_fewer_tokens(tmp_path):
    """Its tokens alone count, as they do where it reads along."""
    model, small = frozen(vocab_size=VOCABULARY + 8), teacher(vocab_size=VOCABULARY)
    file = tmp_path / "pairs.parquet"
    data = add_kd_cache(dataset(), small, TOKENIZER, file, student=model)
    found = train(tmp_path / "found", data, model)
    assert_same_step(found, with_teacher(tmp_path / "expected", model, teacher_model=small))


@pytest.mark.parametrize(("kind", "products"), [("means", 2), ("tokens", 4)])
def test_products(tmp_path, kind, products):
    """As docs/methods.md says; the head of the tokens' student trains."""
    sizes = {"vocab_size": 20_000}
    model = frozen(**sizes) if kind == "means" else student(**sizes)
    options = {"student": model} if kind == "means" else {"top_k": 4}
    file, tall = tmp_path / "pairs.parquet", teacher(**sizes)
    found = train(tmp_path, add_kd_cache(dataset(), tall, TOKENIZER, file, **options), model)
    batch = batch_of(found)
    tokens = int(batch["completion_mask"][:, 1:].sum())

    def step() -> None:
        found.compute_loss(found.model, dict(batch)).backward()

    step()
    measured = flops_of(step) / (2 * sizes["vocab_size"] * 16)
    # The rest is the layers, and one position for the model's own idea of its logits.
    assert products * tokens < measured < products * tokens * 1.02 + 6


def test_few_tokens_train(tmp_path, pairs):
    logged = history(train(tmp_path, pairs["tokens"], student()))
    assert logged[7]["divergence/chosen"] < logged[0]["divergence/chosen"]


def test_training_and_evaluation(tmp_path, pairs):
    data = pairs["means"]
    found = train(tmp_path / "found", data, eval_dataset=data.select([5, 1]))
    logged, expected = history(found), history(with_teacher(tmp_path / "expected", frozen()))
    assert logged[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-3)
    again = found.evaluate(data.select([5, 1]))["eval_loss"]
    assert again == pytest.approx(found.evaluate()["eval_loss"], rel=1e-6)
    with pytest.raises(ValueError, match="eval_dataset: expected columns that were made with"):
        found.evaluate(pairs["cool means"])


def test_rows_of_a_server_may_have_fewer_tokens(tmp_path, pairs):
    """Filled up with tokens that nothing is known of."""
    infinity = float("inf")

    def longer(row, index):
        if index % 2:
            return row
        ids = [[*one, 7] for one in row["chosen_teacher_token_ids"]]
        logps = [[*one, -infinity] for one in row["chosen_teacher_token_logps"]]
        return {**row, "chosen_teacher_token_ids": ids, "chosen_teacher_token_logps": logps}

    data = pairs["tokens"].map(longer, with_indices=True)
    found = train(tmp_path / "found", data)
    assert_same_step(found, train(tmp_path / "expected", pairs["tokens"]))


REFUSED = [
    ("chosen means", {}, {}, "train_dataset: expected columns .*, got no rejected_teacher_weights"),
    ("means", {"model": student()}, {}, "model: expected a head that does not train, since"),
    ("means", {"model": frozen(seed=1)}, {}, "model: expected the head that chosen_teacher_wei"),
    ("means", {}, {"method": "gkd"}, "teacher_model: expected a model, .* and not 'jsd'"),
    ("means", {}, {**GKD, "lmbda": 0.5}, "lmbda: expected 0, since the dataset's columns have"),
    ("means", {}, {**GKD, "divergence_temperature": 2.0},
     "train_dataset: expected columns that were made with temperature 2, got 1"),
    ("means", {"teacher_model": teacher()}, {}, "teacher_model: expected None, since the train"),
    ("means", {}, {"max_length": 16}, "_teacher_entropies: expected .* positions, one for each"),
    ("means", {}, {"truncation_mode": "keep_end"}, "truncation_mode: expected 'keep_start'"),
    ("means", {}, {"topk_tail": "drop"}, "topk_tail: expected 'bucket', since the dataset's"),
    ("tokens", {}, {"topk_tail": "best"}, "topk_tail: expected 'bucket' or 'drop' or"),
    ("means", {"eval_dataset": dataset()}, {}, "eval_dataset: expected columns chosen_teacher_w"),
    ("means", {}, {"method": "dpkd_token"}, "teacher_model: .* and not 'token_preference'"),
    ("means", {}, {"method": "adpa"}, "teacher_model: expected a model, .* and not 'advantage'"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "options", "settings", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_what_is_refused(tmp_path, pairs, columns, options, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, pairs[columns], settings=settings, **options)


def test_rows_of_a_stream_that_do_not_fit(tmp_path, pairs):
    stream = pairs["means"].to_iterable_dataset()
    found = train(tmp_path, stream, settings={"max_steps": 8, "max_length": 16})
    with pytest.raises(ValueError, match="_teacher_weights: expected .* positions, one for each"):
        found.train()


def test_columns_of_both_kinds(tmp_path, pairs):
    columns = ["chosen_teacher_token_ids", "chosen_teacher_token_logps"]
    data = pairs["means"]
    for name in columns:
        data = data.add_column(name, pairs["tokens"][name][:])
    with pytest.raises(ValueError, match="train_dataset: expected .*weights or .*ids, got both"):
        train(tmp_path, data)


def test_columns_that_no_loss_reads_are_left_alone(tmp_path, pairs):
    logged = history(train(tmp_path, pairs["means"], method="simpo"))
    assert "rewards/margins" in logged[0]
