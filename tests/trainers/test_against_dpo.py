"""DPO, IPO, and TVKD without a teacher follow TRL's own trainer step by step."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from training import (
    SETTINGS,
    TOKENIZER,
    assert_same,
    dataset,
    history,
    student,
    trainer,
)
from trl import DPOConfig, DPOTrainer
from trl_trainer import needs_trls_trainer

from fastpref.integrations.trl import PreferenceConfig, PreferenceTrainer, TVKDConfig, TVKDTrainer

WITH_REFERENCE = {"method": "tvkd", "alpha": 0.0, "reference_free": False}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
pytestmark = needs_trls_trainer


def both(tmp_path, model, *, settings=None, theirs=None, ours=None, **options):
    """Two trainings with the same settings and TRL's own or fastpref's beside."""
    expected = trainer(
        DPOTrainer, DPOConfig, tmp_path, model,
        settings={**(settings or {}), **(theirs or {})}, **copy.deepcopy(options),
    )  # fmt: skip
    found = trainer(
        PreferenceTrainer, PreferenceConfig, tmp_path, model,
        settings={**(settings or {}), **(ours or WITH_REFERENCE)}, **options,
    )  # fmt: skip
    return found, expected


def assert_same_training(ours, theirs, *others):
    """Step by step, and in the end; but for metrics of other meaning."""
    expected = history(theirs)
    for entry in expected:
        for name in others:
            entry.pop(name, None)
    assert_same(history(ours), expected)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.5},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"logging_steps": 3, "max_length": 24},
        {"precompute_ref_log_probs": True},
    ],
    ids=["plain", "accumulated", "truncated", "precomputed"],
)
def test_with_a_reference_model(tmp_path, settings):
    assert_same_training(*both(tmp_path, student(), settings=settings, ref_model=student(seed=5)))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo(tmp_path, beta):
    ours = {"method": "dpo", "beta": beta}
    assert_same_training(
        *both(tmp_path, student(), theirs={"beta": beta}, ours=ours, ref_model=student(seed=5))
    )


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo(tmp_path, beta):
    """TRL logs rewards of whole responses, which are not those of the loss."""
    theirs, ours = {"beta": beta, "loss_type": ["ipo"]}, {"beta": beta, "method": "ipo"}
    # Squares magnify what steps have rounded: small steps keep the two within the tolerance.
    settings = {"learning_rate": 1e-4}
    trainers = both(
        tmp_path, student(), settings=settings, theirs=theirs, ours=ours, ref_model=student(seed=5)
    )
    names = ("chosen", "rejected", "margins", "accuracies")
    assert_same_training(*trainers, *(f"rewards/{name}" for name in names))


def test_a_plain_dpo_config(tmp_path):
    """All of its fields count, and ours are at their defaults."""
    options = {
        "settings": {"beta": 0.3, "max_length": 24, "label_smoothing": 0.2, "seed": 7},
        "ref_model": student(seed=5),
    }
    found = trainer(PreferenceTrainer, DPOConfig, tmp_path, student(), **options)
    expected = DPOConfig(str(tmp_path), **SETTINGS | options["settings"])
    for field in dataclasses.fields(DPOConfig):
        assert getattr(found.args, field.name) == getattr(expected, field.name), field.name
    settings = {**options["settings"], "method": "dpo"}
    ours = trainer(
        PreferenceTrainer, PreferenceConfig, tmp_path, student(),
        **{**options, "settings": settings},
    )  # fmt: skip
    fields = dataclasses.fields(PreferenceConfig)
    assert all(getattr(found.args, one.name) == getattr(ours.args, one.name) for one in fields)
    assert_same(history(found), history(ours))


def test_heads_that_scale_and_cap(tmp_path):
    sizes = {
        "vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    configs = (
        transformers.CohereConfig(**sizes, logit_scale=0.25),
        transformers.Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=5.0),
    )
    for config in configs:
        torch.manual_seed(0)
        model, ref_model = (transformers.AutoModelForCausalLM.from_config(config) for _ in "12")
        ours, theirs = both(tmp_path, model, ref_model=ref_model)
        # A mean logit under a soft cap is not linear in the state.
        others = ("logits/chosen", "logits/rejected") if config.model_type == "gemma2" else ()
        assert_same_training(ours, theirs, *others)
        assert not set(others) & set(ours.state.log_history[0])


def test_without_a_reference(tmp_path):
    """TRL is given columns of zeros, which is what no reference means."""
    zeros = {"ref_chosen_logps": [0.0] * 8, "ref_rejected_logps": [0.0] * 8}
    theirs = trainer(
        DPOTrainer, DPOConfig, tmp_path, student(), ref_model=student(seed=5),
        train_dataset=dataset(**zeros),
    )  # fmt: skip
    theirs.precompute_ref_logps = True  # so that it reads them
    ours = trainer(TVKDTrainer, TVKDConfig, tmp_path, student(), settings={"alpha": 0.0})
    assert ours.ref_model is None
    assert_same(history(ours), history(theirs))


def test_the_copy_of_the_student_is_the_reference(tmp_path):
    student(seed=3).save_pretrained(tmp_path / "student")
    ours, theirs = both(tmp_path, str(tmp_path / "student"))
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("wrapped", [False, True], ids=["config", "wrapped"])
def test_the_student_without_its_adapter_is_the_reference(tmp_path, wrapped):
    """And where training goes on with an adapter, the student with the adapter it began with."""
    model, options = student(seed=3), {"peft_config": LORA}
    if wrapped:
        torch.manual_seed(1)
        model, options = get_peft_model(model, LORA), {}
    ours, theirs = both(tmp_path, model, **options)
    found = history(ours)
    assert_same(found, history(theirs))
    if not wrapped:
        first = found[0]["rewards/chosen"]
        assert abs(first) > 1e-3, "the reference was the student itself"


def test_evaluation(tmp_path):
    ours, theirs = both(tmp_path, student(), ref_model=student(seed=5), eval_dataset=dataset(6))
    found, expected = ours.evaluate(), theirs.evaluate()
    names = [name for name in expected if not name.endswith(("runtime", "per_second", "time"))]
    assert "eval_rewards/margins" in names and "eval_entropy" in names
    assert_same([found], [{name: expected[name] for name in names}])
