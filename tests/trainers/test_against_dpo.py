"""Without a teacher TVKD is DPO: it follows TRL's own trainer step by step."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from training import TOKENIZER, assert_same, dataset, history, student, trainer
from trl import DPOConfig, DPOTrainer

from fastpref.integrations.trl import TVKDConfig, TVKDTrainer

WITH_REFERENCE = {"alpha": 0.0, "reference_free": False}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def both(tmp_path, model, *, settings=None, ours=WITH_REFERENCE, **options):
    theirs = trainer(
        DPOTrainer, DPOConfig, tmp_path, model, settings=settings, **copy.deepcopy(options)
    )
    found = trainer(
        TVKDTrainer, TVKDConfig, tmp_path, model, settings=(settings or {}) | ours, **options
    )
    return found, theirs


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
    ours, theirs = both(tmp_path, student(), settings=settings, ref_model=student(seed=5))
    expected, found = history(theirs), history(ours)
    for entry in [*expected, *found]:
        for sampled in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
            if "logging_steps" in settings:  # ours are of the steps that log
                entry.pop(sampled, None)
    assert_same(found, expected)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


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
        found, expected = history(ours), history(theirs)
        if config.model_type == "gemma2":  # whose mean logit is not linear in the state
            assert not {"logits/chosen", "logits/rejected"} & set(found[0])
            for entry in expected:
                entry.pop("logits/chosen", None), entry.pop("logits/rejected", None)
        assert_same(found, expected)


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
    assert_same(history(ours), history(theirs))


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
