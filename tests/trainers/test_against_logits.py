"""What trainers compute at the head is the loss of the whole logits, gradients included."""

from __future__ import annotations

import formulas
import pytest
import torch
from counting import peak_bytes_of
from peft import LoraConfig
from training import (
    TOKENIZER,
    assert_same,
    dataset,
    history,
    models_for,
    numbers,
    signal,
    student,
    teacher,
    trainer,
)

from fastpref import Responses, sum_responses
from fastpref.integrations.trl import PreferenceConfig, PreferenceTrainer
from fastpref.losses import METHODS
from fastpref.models import lm_head_of
from fastpref.ops import tiling

DATA = dataset(**signal("shaping"), **signal("reward"))
VOCABULARY = len(TOKENIZER)


def preference_trainer(folder, method, *, model=None, settings=None, **options):
    # Of the student's own responses there is a test below.
    of_the_dataset = {"lmbda": 0.0} if "gkd" in method else {}
    settings = {"method": method, **of_the_dataset, **(settings or {})}
    options = {"train_dataset": DATA, **options}
    classes = PreferenceTrainer, PreferenceConfig
    return trainer(*classes, folder, model or student(), settings=settings, **options)


def batch_of(found):
    return found._prepare_inputs(next(iter(found.get_train_dataloader())))


def labels_of(batch):
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]


def read(model, batch):
    """The states that a model's head reads, and the head."""
    states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    return states[:, :-1], lm_head_of(model)


def cut(states, head):
    """The head without columns that are no tokens, which no divergence knows of."""
    return states, head._replace(weight=head.weight[:VOCABULARY])


def naive_inputs(method, model, batch, models, options):
    """What a loss reads, from full logits."""
    labels, wanted = labels_of(batch), set(METHODS[method].__annotations__)
    states, head = read(model, batch)
    logps = formulas.linear_logps(states, head, labels)
    lengths = (labels != -100).sum(1)
    pairs = len(labels) // 2
    found = {}
    others = {name: one for name, one in models.items() if name.endswith("model")}
    with torch.no_grad():
        others = {name: read(one, batch) for name, one in others.items()}

    def divergences(name, kind="forward_kl", **options):
        both = (states, head), cut(*others[name])
        return formulas.linear_divergence(*both, labels, kind=kind, **options).sum(1)

    for name, other in others.items():
        if name in ("ref_model", "teacher_model"):
            key = {"ref_model": "ref_logps", "teacher_model": "teacher_logps"}[name]
            found[key] = formulas.linear_logps(*other, labels).sum(1)
    if method in ("tdpo", "dckd"):
        found["divergences"] = divergences("ref_model" if method == "tdpo" else "teacher_model")
    if method == "vanilla_kd":
        found["divergences"] = divergences("teacher_model")[:pairs]
    if method == "gkd":
        options = {"kind": "jsd", **options}
        found["divergences"] = divergences("teacher_model", **options)[:pairs]
    if method == "dpkd_token":
        both = (states, head), cut(*others["teacher_model"])
        options = {"beta": 0.1, **options}
        losses = formulas.linear_token_preference(*both, labels, **options)
        found["divergences"] = losses.sum(1)[:pairs]
    if method == "adpa":
        options = {"reference": cut(*others["teacher_ref_model"]), **options}
        found["advantages"] = divergences("teacher_model", **options)[pairs:]
    if method == "wpo":
        sums = formulas.linear_stats(states, head, labels)["log_sum_squared_probs"]
        found["log_weights"] = ((logps - sums).sum(1) / lengths).detach()
    if method == "kto":
        found["desirable"] = torch.arange(2 * pairs) < pairs
        found["kl_log_ratios"] = mismatched_ratios(batch, model, models["ref_model"])
    rows = slice(pairs) if "chosen" in wanted else slice(None)
    responses = Responses(logps.sum(1)[rows], lengths[rows])
    return responses, {name: one for name, one in found.items() if name in wanted}


def mismatched_ratios(batch, *models):
    """Of the prompt of each row with the response of the row before it, row by row."""
    rows = []
    for tokens, attended, response in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        rows.append((tokens[(attended == 1) & (response == 0)], tokens[response == 1]))
    ratios = []
    for row, (prompt, _) in enumerate(rows):
        response = rows[row - 1][1]
        tokens = torch.cat([prompt, response]).unsqueeze(0)
        labels = torch.cat([torch.full_like(prompt, -100), response])[1:].unsqueeze(0)
        one = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            sums = [formulas.linear_logps(*read(model, one), labels).sum() for model in models]
        ratios.append(sums[0] - sums[1])
    return torch.stack(ratios)


def naive_loss(method, model, batch, models, options=None, **of_loss):
    responses, given = naive_inputs(method, model, batch, models, options or {})
    return METHODS[method](responses, **given, **of_loss).loss


def assert_same_gradients(found, naive):
    ours = dict(found.model.named_parameters())
    for name, other in naive.named_parameters():
        gradient = torch.zeros_like(other) if other.grad is None else other.grad
        torch.testing.assert_close(ours[name].grad, gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_columns_are_as_good_as_the_teacher(tmp_path):
    size = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    along = preference_trainer(tmp_path, "dpkd", settings=size, **models_for("dpkd"))
    batch = batch_of(along)
    chosen, rejected = along.readers[0](batch, labels_of(batch), 8)[0]["teacher_logps"].chunk(2)
    columns = {"teacher_chosen_logps": chosen, "teacher_rejected_logps": rejected}
    data = dataset(**{name: one.tolist() for name, one in columns.items()})
    found = preference_trainer(tmp_path, "dpkd", settings=size, train_dataset=data)
    assert_same(history(found), history(along))


def test_columns_may_be_lists_of_several_oracles(tmp_path):
    columns = {
        f"{side}_reward": [
            list(pair) for pair in zip(numbers(seed), numbers(seed + 1), strict=True)
        ]
        for side, seed in (("chosen", 1), ("rejected", 3))
    }
    found = preference_trainer(
        tmp_path, "edpo", train_dataset=dataset(**columns), **models_for("edpo")
    )
    batch = batch_of(found)
    assert batch["chosen_reward"].shape == (2, 2)
    model, reference, labels = found.model, found.ref_model, labels_of(batch)
    with torch.no_grad():
        logps, ref_logps = (
            sum_responses(formulas.linear_logps(*read(one, batch), labels), labels)
            for one in (model, reference)
        )
    rewards = torch.cat([batch["chosen_reward"], batch["rejected_reward"]]).T
    expected = METHODS["edpo"](logps, ref_logps.logps, rewards).loss
    loss = found.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    of_one = METHODS["edpo"](logps, ref_logps.logps, rewards[0]).loss
    assert abs(float(loss.detach() - of_one)) > 1e-3


def test_the_student_without_its_adapter_is_the_reference(tmp_path):
    """At every token, and of mismatched responses."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for method in ("tdpo", "kto"):
        torch.manual_seed(0)
        found = preference_trainer(tmp_path, method, peft_config=lora)
        torch.manual_seed(0)
        expected = preference_trainer(tmp_path, method, peft_config=lora, ref_model=student())
        logged = history(found)
        assert_same(logged, history(expected))
        assert abs(logged[0]["rewards/chosen"]) > 1e-3, "the reference was the student itself"


@pytest.mark.parametrize("method", ["tdpo", "dckd", "adpa", "wpo", "gkd", "kto"])
def test_bf16_and_checkpointing(tmp_path, method):
    step = {"max_steps": 1}
    settings = {"bf16": True, "gradient_checkpointing": True, **step}
    found = history(preference_trainer(tmp_path, method, settings=settings, **models_for(method)))
    whole = history(preference_trainer(tmp_path, method, settings=step, **models_for(method)))
    assert found[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.1, abs=0.05)


def test_a_teacher_in_another_dtype(tmp_path):
    models = {**models_for("dckd"), "settings": {"max_steps": 1}}
    expected = history(preference_trainer(tmp_path, "dckd", **models))
    models["teacher_model"] = teacher().bfloat16()
    found = history(preference_trainer(tmp_path, "dckd", **models))
    assert found[0]["divergence/chosen"] != expected[0]["divergence/chosen"]
    assert found[0]["divergence/chosen"] == pytest.approx(expected[0]["divergence/chosen"], rel=0.1)


def test_evaluation(tmp_path):
    models = models_for("dckd")
    found = preference_trainer(tmp_path, ["dckd", "dpkd"], eval_dataset=dataset(4), **models)
    logged = found.evaluate()
    assert {"eval_loss", "eval_losses/dckd", "eval_divergence/rejected"} <= set(logged)
    whole = logged["eval_losses/dckd"] + logged["eval_losses/dpkd"]
    assert logged["eval_loss"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("method", ["tdpo", "adpa"])
def test_no_logits_exist(tmp_path, method, monkeypatch):
    """In a whole step, of no model; blocks of six rows are as small as the batch is."""
    sizes = {"vocab_size": 100_000, "hidden_size": 4}
    row = 4 * sizes["vocab_size"]
    monkeypatch.setattr(tiling, "CPU_BLOCK_BYTES", 12 * row)
    models = {
        name: student(seed=3, **sizes) if name.endswith("model") else one
        for name, one in models_for(method).items()
    }
    settings = {"per_device_train_batch_size": 8, "scratch_bytes": 0}
    found = preference_trainer(
        tmp_path, method, model=student(**sizes), settings=settings, **models
    )
    batch = batch_of(found)

    def step() -> None:
        found.compute_loss(found.model, dict(batch)).backward()

    step()
    logits = row * int((labels_of(batch) != -100).sum())
    head = row * sizes["hidden_size"]
    # Gradients of head and embedding, as they are computed and added up; blocks, and tiles.
    assert peak_bytes_of(step) < 8 * head + 8 * row + 2 * 12 * 2**20 < logits


METHODS_AND_SETTINGS = [
    ("sft", {}),
    ("seqkd", {}),
    ("cpo", {}),
    ("orpo", {}),
    ("wpo", {"beta": 0.3, "clamp": False}),
    ("tdpo", {"beta": 0.3}),
    ("tdpo", {"alpha": 1.0, "stop_gradient": False}),
    ("vanilla_kd", {"weight": 0.7, "sft_weight": 0.3}),
    ("dckd", {"chosen_weight": 0.5, "rejected_weight": 2.0}),
    ("dpkd", {"beta": 0.5}),
    ("dpkd_token", {"token_beta": 0.5, "weight": 2.0}),
    ("gkd", {"sft_weight": 0.5}),
    ("gkd", {"jsd_beta": 0.9}),
    ("gkd", {"divergence": "reverse_kl", "divergence_temperature": 2.0, "sft_weight": 0.5}),
    ("gkd", {"divergence": "skew_kl", "skew_alpha": 0.3}),
    ("adpa", {"weight": 0.8}),
    ("adpa", {"advantage_clip": [0.0, 1.0], "sft_weight": 0.5}),
    ("kto", {"beta": 0.3, "undesirable_weight": 0.5}),
]
# What the options of a divergence are called where it is computed.
OF_DIVERGENCE = {
    "divergence": "kind",
    "jsd_beta": "beta",
    "token_beta": "beta",
    "skew_alpha": "alpha",
    "divergence_temperature": "temperature",
    "advantage_clip": "clip",
}


@pytest.mark.parametrize(("method", "settings"), METHODS_AND_SETTINGS, ids=str)
def test_the_loss_is_that_of_full_logits(tmp_path, method, settings):
    models = models_for(method)
    found = preference_trainer(tmp_path, method, settings=settings, **models)
    batch = batch_of(found)
    loss = found.compute_loss(found.model, dict(batch))
    loss.backward()
    naive = student()
    options = {new: settings[old] for old, new in OF_DIVERGENCE.items() if old in settings}
    of_loss = {name: one for name, one in settings.items() if name not in OF_DIVERGENCE}
    expected = naive_loss(method, naive, batch, models_for(method), options, **of_loss)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, naive)
