"""A wrong set-up is refused before training, in a sentence that says what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import json

import pytest
from tiny_models import tiny_model, tiny_tokenizer
from training import TOKENIZER, dataset, numbers, signal, student, trainer

import fastpref.integrations.trl
from fastpref.integrations.trl import (
    DRDOConfig,
    DRDOTrainer,
    OracleConfig,
    OracleTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    TVKDConfig,
    TVKDTrainer,
)
from fastpref.integrations.trl.readers import load_frozen
from fastpref.models.reward_head import add_reward_head

SHAPED = {"train_dataset": dataset(**signal("shaping"))}
REWARDED = {"train_dataset": dataset(**signal("reward"))}
OTHER = tiny_tokenizer(60)
LISTS = {"chosen_reward": [[0.0, 1.0]] * 7 + [[0.0]], "rejected_reward": [[0.0, 1.0]] * 8}
LOGPS = {"teacher_chosen_logps": numbers(1), "teacher_rejected_logps": numbers(2)}


def tvkd(folder, **options):
    return trainer(TVKDTrainer, TVKDConfig, folder, student(), **options)


def drdo(folder, **options):
    return trainer(DRDOTrainer, DRDOConfig, folder, student(), **options)


def oracle(folder, **options):
    return trainer(OracleTrainer, OracleConfig, folder, student(), **options)


def method(name):
    def make(folder, **options):
        settings = {"method": name}
        classes = PreferenceTrainer, PreferenceConfig
        return trainer(*classes, folder, student(), settings=settings, **options)

    return make


def teacher(tokenizer=TOKENIZER):
    return {"teacher_model": tiny_model(tokenizer), "teacher_processing_class": tokenizer}


REFERENCE = tiny_model(TOKENIZER, seed=5)
WITH_REFERENCE = {**teacher(), "teacher_ref_model": REFERENCE}
IMPLICIT = {"potential": "implicit_reward"}


def with_reward_head(tokenizer=TOKENIZER):
    model = tiny_model(tokenizer)
    add_reward_head(model)
    return {"oracle_model": model, "oracle_processing_class": tokenizer}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tvkd, {}, "train_dataset: expected columns chosen_shaping and rejected_shaping; add them "
                   "with `fastpref values`"),
        (tvkd, {**SHAPED, "eval_dataset": dataset()}, "eval_dataset: .* no chosen_shaping"),
        (tvkd, {**SHAPED, **teacher()}, "teacher_model: expected None, since the train dataset"),
        (tvkd, teacher(OTHER), "teacher_model: expected the student's vocabulary"),
        (tvkd, {"teacher_model": tiny_model(TOKENIZER)}, "teacher_processing_class: expected"),
        (tvkd, {"teacher_model": "nowhere/to be found"}, "teacher_model: expected a model folder"),
        (tvkd, {**SHAPED, "ref_model": student(seed=5)}, "ref_model: .* reference_free=False"),
        (tvkd, {**SHAPED, "compute_metrics": print}, "compute_metrics: expected None"),
        (drdo, {}, "train_dataset: expected columns chosen_reward and rejected_reward"),
        (drdo, {**REWARDED, **with_reward_head()}, "oracle_model: expected None"),
        (method("edpo"), {"train_dataset": dataset(**LISTS)},
         r"chosen_reward: expected as many numbers in every row as in the first, got .* .row 7."),
        (drdo, with_reward_head(OTHER), "oracle_model: expected the student's vocabulary"),
        (drdo, {**with_reward_head(), "oracle_model": tiny_model(TOKENIZER)},
         "model: expected a reward head"),
        (method("dckd"), {}, "teacher_model: expected a model, .* by method 'dckd' .*kd-cache"),
        (method("gkd"), teacher(OTHER), "teacher_model: .*vocabulary, .* in every step, got"),
        (method("adpa"), teacher(), "teacher_ref_model: expected a model, .*, got None"),
        (method("dpkd"), {}, "train_dataset: expected columns teacher_chosen_logps and teacher_re"),
        (method("dpkd"), {**teacher(), "train_dataset": dataset(**LOGPS)},
         "teacher_model: expected None, since the train dataset has teacher_chosen_logps"),
        (method("dpo"), teacher(), "teacher_model: expected None, since the loss reads nothing"),
        (method("dckd"), {**teacher(), "teacher_ref_model": student()},
         "teacher_ref_model: expected None, since the loss reads nothing of it"),
        (tvkd, {**SHAPED, "teacher_ref_model": student(seed=5)},
         "teacher_ref_model: expected None, since the loss reads nothing of it"),
        (tvkd, {**teacher(), "teacher_ref_model": student(seed=5)},
         "teacher_ref_model: expected None, since the loss reads nothing of it"),
        (method("sft"), {"ref_model": student(seed=5)}, "ref_model: expected None"),
        (method(["tvkd", "dckd"]), {**SHAPED, **teacher()},
         "train_dataset: expected no chosen_shaping and .*, which teacher_model computes"),
    ],
)  # fmt: skip
def test_arguments(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


@pytest.mark.parametrize(
    ("make", "options", "settings", "message"),
    [
        (
            tvkd,
            SHAPED,
            {"loss_type": ["ipo"]},
            "loss_type: expected .'sigmoid'., since",
        ),
        (tvkd, SHAPED, {"loss_weights": [2.0]}, "loss_weights"),
        (tvkd, SHAPED, {"use_weighting": True}, "use_weighting"),
        (tvkd, SHAPED, {"ld_alpha": 0.5}, "ld_alpha"),
        (tvkd, SHAPED, {"f_divergence_type": "forward_kl"}, "f_divergence_type"),
        (tvkd, SHAPED, {"f_alpha_divergence_coef": 0.1}, "f_alpha_divergence_coef"),
        (tvkd, SHAPED, {"discopop_tau": 0.1}, "discopop_tau"),
        (tvkd, SHAPED, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (tvkd, SHAPED, {"sync_ref_model": True}, "sync_ref_model: .* no reference"),
        (tvkd, SHAPED, {"precompute_ref_batch_size": 2}, "precompute_ref_batch_size: .* no refer"),
        (tvkd, SHAPED, {"gamma": 0.9}, "gamma: expected 1.0, since there is no teacher_model"),
        (tvkd, teacher(), {"alpha": 0.0}, "teacher_model: expected None, since .*alpha=0"),
        (tvkd, teacher(), {"potential": "best"}, "potential: expected 'value' or"),
        (tvkd, SHAPED, IMPLICIT, "potential: expected 'value', since there is no teacher_model"),
        (tvkd, teacher(), IMPLICIT, "teacher_ref_model: expected a model, the teacher before it"),
        (
            tvkd,
            {**WITH_REFERENCE, "teacher_model": REFERENCE},
            IMPLICIT,
            "teacher_ref_model: expected another model than the teacher",
        ),
        (tvkd, WITH_REFERENCE, {**IMPLICIT, "alpha": 0.0}, "teacher_ref_model: expected None, si"),
        (tvkd, WITH_REFERENCE, {**IMPLICIT, "value_beta": 0.0}, "value_beta: .* above 0"),
        (
            tvkd,
            teacher(),
            {"teacher_model_name_or_path": "t"},
            "teacher_model: expected None beside teacher_model_name_or_path='t'",
        ),
        (tvkd, SHAPED, {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "_kwargs: .* without"),
        (
            tvkd,
            teacher(),
            {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
            "teacher_model_init_kwargs: expected None, since the teacher is loaded already",
        ),
        (tvkd, teacher(), {"skip_bad_rows": True}, "skip_bad_rows: expected False, since rows"),
        (
            tvkd,
            teacher(),
            {"precompute_shaping": True, "max_length": 8},
            "train_dataset: expected rows that the teacher can read; .* skip_bad_rows=True",
        ),
        (
            tvkd,
            teacher(),
            {"precompute_shaping": True, "truncation_mode": "keep_end"},
            "truncation_mode: expected 'keep_start'",
        ),
        (drdo, REWARDED, {"beta": 0.5}, "beta: expected None, since method 'drdo' has no such"),
        (drdo, REWARDED, {"label_smoothing": 0.1}, "label_smoothing: expected None, since"),
        (drdo, REWARDED, {"sync_ref_model": True}, "sync_ref_model"),
        (oracle, {}, {"beta": 0.5}, "beta: expected None, since method 'oracle' has"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_settings(tmp_path, make, options, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, settings=settings, **options)


@pytest.mark.parametrize(
    ("precompute", "message"),
    [(False, "the student's vocabulary, .* in every step"), (True, "the teacher's vocabulary")],
)
def test_a_reference_of_another_vocabulary(tmp_path, precompute, message):
    for name, tokenizer in (("teacher", TOKENIZER), ("before", OTHER)):
        tiny_model(tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    models = {"teacher_model": "teacher", "teacher_ref_model": "before"}
    models = {argument: str(tmp_path / name) for argument, name in models.items()}
    settings = {**IMPLICIT, "precompute_shaping": precompute}
    with pytest.raises(ValueError, match=f"teacher_ref_model: expected {message}"):
        tvkd(tmp_path, settings=settings, **models)


def test_a_teacher_that_is_the_student(tmp_path):
    model = tiny_model(TOKENIZER)
    args = TVKDConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="teacher_model: expected another model"):
        TVKDTrainer(
            model, args=args, teacher_model=model, teacher_processing_class=TOKENIZER,
            train_dataset=dataset(), processing_class=TOKENIZER,
        )  # fmt: skip


def test_a_folder_without_a_reward_head(tmp_path):
    tiny_model(TOKENIZER).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="folder: expected a folder with reward_head.safetensors"):
        drdo(tmp_path, oracle_model=str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), None])
def test_rows_without_a_number(tmp_path, value):
    """Seen at once; those of a stream when they come."""
    columns = {"chosen_shaping": [*numbers(1)[:7], value], "rejected_shaping": numbers(2)}
    data, message = dataset(**columns), "chosen_shaping: expected a finite number in every row"
    with pytest.raises(ValueError, match=message):
        tvkd(tmp_path, train_dataset=data)
    stream = data.to_iterable_dataset()
    found = tvkd(tmp_path, train_dataset=stream, settings={"max_steps": 8})
    with pytest.raises(ValueError, match=message):
        found.train()


@pytest.mark.parametrize("version", ["1.13.2", "1.17.0", "2.0.0rc1"])
def test_another_trl(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(ImportError, match=f"expected TRL 1.14 to 1.16, got {version}; pip install"):
        importlib.reload(fastpref.integrations.trl)


def test_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch):
    """It lies where a frozen model came from; nobody is asked whether to run it."""
    folder, traces, asked = tmp_path / "model", tmp_path / "traces", []
    TOKENIZER.save_pretrained(folder)
    (folder / "own.py").write_text(f"import os; os.mkdir({str(traces)!r})", "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    model = tiny_model(TOKENIZER)
    model.config._name_or_path = str(folder)
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    with pytest.raises(ValueError, match="teacher_processing_class: expected the tokenizer of"):
        load_frozen("teacher_model", model, None)
    assert not asked and not traces.exists()
