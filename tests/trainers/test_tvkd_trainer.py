"""TVKDTrainer computes the paper's loss, wherever the shaping comes from."""

from __future__ import annotations

import formulas
import pytest
import torch
from counting import peak_bytes_of
from datasets import Dataset
from tiny_models import tiny_model, tiny_tokenizer
from training import (
    TOKENIZER,
    assert_same,
    dataset,
    history,
    numbers,
    signal,
    student,
    trainer,
)

from fastpref.integrations.trl import TVKDConfig, TVKDTrainer
from fastpref.integrations.trl.signals import SHAPING
from fastpref.teacher import add_shaping

OF_TABLE_5 = {"potential": "margin", "terminal": "zero", "gamma": 0.5}
OF_TEACHER = {"gamma": 0.9, "temperature": 2.0, "form": "next_value"}


def tvkd(folder, model=None, **options):
    return trainer(TVKDTrainer, TVKDConfig, folder, model or student(), **options)


def with_teacher(folder, *, settings=None, tokenizer=TOKENIZER, seed=7, **options):
    model = tiny_model(tokenizer, seed=seed)
    return tvkd(
        folder,
        settings=settings,
        teacher_model=model,
        teacher_processing_class=tokenizer,
        **options,
    )


def batch_of(found):
    return found._prepare_inputs(next(iter(found.get_train_dataloader())))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.02, "alpha": 0.7},
        {"length_normalize": True, "label_smoothing": 0.1, "sft_weight": 0.3},
    ],
    ids=["plain", "paper", "everything"],
)
def test_the_loss_is_the_formula(tmp_path, settings):
    data = dataset(**signal("shaping"))
    found = tvkd(tmp_path, settings=settings, train_dataset=data)
    batch = batch_of(found)
    loss = found.compute_loss(found.model, dict(batch))
    loss.backward()

    naive = student()
    states = naive.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    shaping = torch.cat([batch["chosen_shaping"], batch["rejected_shaping"]])
    expected = formulas.tvkd_loss(
        states[:, :-1], naive.lm_head.weight, labels, shaping, **{"beta": 0.1, **settings}
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, one), other in zip(found.model.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("of_teacher", "settings"),
    [({}, {}), ({"max_length": 16}, {"max_length": 16}),
     (OF_TEACHER, {"gamma": 0.9, "value_temperature": 2.0, "form": "next_value"}),
     (OF_TABLE_5, OF_TABLE_5)],
    ids=["plain", "truncated", "options", "potential"],
)  # fmt: skip
def test_reading_along_precomputed_and_from_columns(tmp_path, of_teacher, settings):
    along = history(with_teacher(tmp_path / "along", settings=settings))
    assert {"shaping/chosen", "shaping/rejected"} <= set(along[0])
    up_front = with_teacher(
        tmp_path / "up front", settings={**settings, "precompute_shaping": True}
    )
    assert up_front.signals["shaping"] == SHAPING, "the teacher is still in memory"
    assert not up_front.readers
    assert_same(history(up_front), along)
    teacher = tiny_model(TOKENIZER, seed=7)
    data = add_shaping(dataset(), teacher, TOKENIZER, tmp_path / "pairs.parquet", **of_teacher)
    kept = {name: value for name, value in settings.items() if name == "max_length"}
    assert_same(history(tvkd(tmp_path / "columns", settings=kept, train_dataset=data)), along)


def test_the_implicit_reward_along_precomputed_and_from_columns(tmp_path):
    settings = {"gamma": 0.9, "potential": "implicit_reward"}
    of_teacher = {**settings, "temperature": 2.0, "beta": 0.5}
    short = {"num_train_epochs": 1}
    settings |= {"value_temperature": 2.0, "value_beta": 0.5, **short}
    reference = tiny_model(TOKENIZER, seed=8, hidden_size=12)
    given = {"settings": settings, "teacher_ref_model": reference}
    found = with_teacher(tmp_path / "along", **given)
    along = history(found)
    assert all(not one.model.training for one in found.readers) and len(found.readers) == 2
    assert along[0]["shaping/chosen"] != 0
    up_front = with_teacher(
        tmp_path / "up front",
        **given | {"settings": {**settings, "precompute_shaping": True}},
    )
    assert up_front.signals["shaping"] == SHAPING and not up_front.readers
    assert_same(history(up_front), along)
    data = add_shaping(
        dataset(), tiny_model(TOKENIZER, seed=7), TOKENIZER, tmp_path / "pairs.parquet",
        reference=reference, **of_teacher,
    )  # fmt: skip
    columns = tvkd(tmp_path / "columns", settings=short, train_dataset=data)
    assert_same(history(columns), along)


def test_shaping_of_sequences_that_were_cut_elsewhere(tmp_path):
    """The columns remember where, through a file, and through what datasets does to them."""
    teacher = tiny_model(TOKENIZER, seed=7)
    add_shaping(dataset(), teacher, TOKENIZER, tmp_path / "pairs.parquet", max_length=16)
    data = Dataset.from_parquet(str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path))
    data = data.map(lambda row: {"note": 1}).filter(lambda row: row["note"]).shuffle(seed=0)
    message = r"max_length=24, but .* made with max_length=16: the numbers of longer rows"
    with pytest.warns(UserWarning, match=message):
        tvkd(tmp_path, settings={"max_length": 24}, train_dataset=data)
    tvkd(tmp_path, settings={"max_length": 16}, train_dataset=data)


def test_a_teacher_of_another_tokenizer_up_front(tmp_path):
    other = tiny_tokenizer(60)
    settings = {"precompute_shaping": True}
    found = with_teacher(tmp_path, settings=settings, tokenizer=other, eval_dataset=dataset(4))
    expected = add_shaping(
        dataset(), tiny_model(other, seed=7), other, tmp_path / "pairs.parquet", batch_size=2
    )
    assert found.train_dataset["chosen_shaping"][:] == expected["chosen_shaping"][:]
    assert "eval_shaping/chosen" in found.evaluate()


def test_a_teacher_that_is_named(tmp_path):
    tiny_model(TOKENIZER, seed=7).save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    named = tvkd(tmp_path, teacher_model=str(tmp_path / "teacher"))
    assert_same(history(named), history(with_teacher(tmp_path)))


def test_a_teacher_and_a_reference(tmp_path):
    settings = {"reference_free": False}
    found = history(with_teacher(tmp_path, settings=settings, ref_model=student(seed=5)))
    without = history(with_teacher(tmp_path))
    assert found[0]["shaping/chosen"] == without[0]["shaping/chosen"]
    assert found[0]["logps/chosen"] == without[0]["logps/chosen"]
    assert found[0]["rewards/chosen"] != without[0]["rewards/chosen"]


def test_a_teacher_that_reads_along_is_frozen(tmp_path):
    found = with_teacher(tmp_path)
    found.train()
    teacher = found.readers[0].model
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_read_up_front_has_no_dropout(tmp_path):
    teacher = tiny_model(TOKENIZER, seed=7, attention_dropout=0.5).train()
    found = tvkd(
        tmp_path, settings={"precompute_shaping": True},
        teacher_model=teacher, teacher_processing_class=TOKENIZER,
    )  # fmt: skip
    expected = add_shaping(
        dataset(),
        tiny_model(TOKENIZER, seed=7),
        TOKENIZER,
        tmp_path / "pairs.parquet",
        batch_size=2,
    )
    assert found.train_dataset["chosen_shaping"][:] == expected["chosen_shaping"][:]


def test_a_teacher_that_the_configuration_names(tmp_path):
    folder = tmp_path / "teacher"
    tiny_model(TOKENIZER, seed=7).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    named = {
        "teacher_model_name_or_path": str(folder),
        "teacher_model_init_kwargs": '{"dtype": "bfloat16"}',
    }
    found = tvkd(tmp_path / "run", settings=named)
    (reader,) = found.readers
    assert reader.argument == "teacher_model" and reader.model.dtype == torch.bfloat16


def test_rows_that_the_teacher_cannot_read_are_left_out(tmp_path):
    settings = {"precompute_shaping": True, "skip_bad_rows": True, "max_length": 60}
    rows = dataset().to_list()
    rows[1]["prompt"] = [{"role": "user", "content": "sky " * 60}]
    with pytest.warns(UserWarning, match="train_dataset: 1 rows .* left out: 1"):
        found = with_teacher(tmp_path, settings=settings, train_dataset=Dataset.from_list(rows))
    assert len(found.train_dataset) == len(rows) - 1


def test_a_file_of_an_earlier_run_gives_its_shaping_only(tmp_path):
    settings = {"precompute_shaping": True}
    with_teacher(tmp_path, settings=settings)
    data = dataset(note=numbers(3))
    found = with_teacher(tmp_path, settings=settings, train_dataset=data)
    assert found.train_dataset["note"][:] == numbers(3)


# torch.compile looks at every tensor it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled(tmp_path):
    small = {"num_hidden_layers": 1}  # tracing takes its time
    options = {
        "ref_model": student(seed=5, **small), "teacher_processing_class": TOKENIZER,
        "teacher_model": tiny_model(TOKENIZER, seed=7, **small),
    }  # fmt: skip
    settings = {"reference_free": False, "num_train_epochs": 1}
    compiled = {**settings, "torch_compile": True, "torch_compile_backend": "eager"}
    expected = history(tvkd(tmp_path, student(**small), settings=settings, **options))
    found = history(tvkd(tmp_path, student(**small), settings=compiled, **options))
    assert_same(found, expected)


def test_predict_and_new_pairs_without_logits(tmp_path):
    found = tvkd(tmp_path, train_dataset=dataset(**signal("shaping")))
    outputs = found.predict(found.train_dataset)
    assert outputs.predictions is None and outputs.metrics["test_loss"] > 0


def test_new_pairs_after_training(tmp_path):
    """There is no reference, so none has to be precomputed ahead of training."""
    found = tvkd(tmp_path, train_dataset=dataset(**signal("shaping")))
    found.train()
    assert "eval_shaping/chosen" in found.evaluate(dataset(4, **signal("shaping", 4)))
    with pytest.raises(ValueError, match="eval_dataset: expected columns chosen_shaping"):
        found.evaluate(dataset(4))


def test_what_a_tensor_parallel_vocabulary_does_not_say(tmp_path):
    found = tvkd(tmp_path, train_dataset=dataset(**signal("shaping")))
    found._tp_size = 2
    found.compute_loss(found.model, batch_of(found))
    assert {"logps/chosen", "entropy"} < set(found._metrics["train"])
    assert "logits/chosen" not in found._metrics["train"]


def test_bf16(tmp_path):
    found = history(with_teacher(tmp_path, settings={"bf16": True}))
    whole = history(with_teacher(tmp_path))
    assert found[0]["shaping/chosen"] == pytest.approx(
        whole[0]["shaping/chosen"], rel=0.05, abs=0.3
    )
    assert found[0]["logps/chosen"] == pytest.approx(whole[0]["logps/chosen"], rel=0.02)


def test_mixtures_of_experts_keep_their_balance(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    settings = {"alpha": 0.0, "router_aux_loss_coef": 0.0}
    without = tvkd(tmp_path, model, settings=settings)
    found = tvkd(tmp_path, model, settings={**settings, "router_aux_loss_coef": 0.5})
    batch = batch_of(found)
    losses = [one.compute_loss(one.model, dict(batch)) for one in (found, without)]
    aux_loss = found._metrics["train"]["aux_loss"][0]
    assert aux_loss > 0 and not without._metrics["train"]["aux_loss"]
    assert (losses[0] - losses[1]).item() == pytest.approx(0.5 * aux_loss, rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_logits_exist(tmp_path, frozen):
    """In a whole step, metrics, teacher and reference included."""
    vocab_size = 150_000
    model = student(vocab_size=vocab_size, hidden_size=4)
    model.lm_head.weight.requires_grad_(not frozen)
    found = tvkd(
        tmp_path, model,
        settings={
            "reference_free": False, "per_device_train_batch_size": 8, "scratch_bytes": 0,
        },
        ref_model=student(seed=5, vocab_size=vocab_size, hidden_size=4),
        teacher_model=tiny_model(TOKENIZER, seed=7, vocab_size=vocab_size, hidden_size=4),
        teacher_processing_class=TOKENIZER,
    )  # fmt: skip
    batch = batch_of(found)
    logits = batch["input_ids"].numel() * vocab_size * 4
    head = vocab_size * 4 * 4

    def step() -> None:
        found.compute_loss(found.model, dict(batch)).backward()

    step()
    assert found._metrics["train"]["entropy"]
    peak = peak_bytes_of(step)
    # Gradients of head and embedding, as they are computed and added up; and tiles of 12 MiB.
    assert peak < 6 * head + 2 * 12 * 2**20 < logits / 3
