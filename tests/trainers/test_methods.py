"""Every method of fastpref.losses is a trainer's, with its options and their help texts."""

from __future__ import annotations

import dataclasses
import doctest
import functools
import inspect
import re
from typing import get_type_hints

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from training import SETTINGS, TOKENIZER, dataset, history, models_for, signal, student, trainer
from transformers import HfArgumentParser, TrainingArguments
from trl import DPOConfig

from fastpref.integrations.trl import (
    DRDOTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    TVKDConfig,
    TVKDTrainer,
)
from fastpref.integrations.trl.config import GIVEN
from fastpref.losses import METHODS
from fastpref.models.reward_head import has_reward_head

NAN = float("nan")
DATA = dataset(**signal("shaping"), **signal("reward"))
OPTIONS = {
    name: [
        option
        for option in inspect.signature(loss).parameters
        if not re.search("Tensor|Responses|Tokens", str(get_type_hints(loss)[option]))
    ]
    for name, loss in METHODS.items()
}


@functools.cache
def helps(config):
    """By option, as the command line shows them; argparse writes %% for %."""
    parser = HfArgumentParser(config)
    assert "--beta" in parser.format_help()
    return {action.dest: action.help for action in parser._actions}


def config(method, **settings):
    return PreferenceConfig("unused", **SETTINGS | {"method": method} | settings)


@pytest.mark.parametrize("method", METHODS)
def test_trains(tmp_path, method):
    found = trainer(
        PreferenceTrainer, PreferenceConfig, tmp_path, student(), train_dataset=DATA,
        settings={"method": method, "max_steps": 2}, **models_for(method),
    )  # fmt: skip
    before = [parameter.clone() for parameter in found.model.parameters()]
    logged = history(found)[0]
    assert found.state.global_step == 2
    assert {"logps/chosen", "entropy", "mean_token_accuracy"} <= set(logged)
    has_rewards = "chosen_rewards" in get_type_hints(METHODS[method])["return"]._fields
    assert ("rewards/margins" in logged) == has_rewards
    after = list(found.model.parameters())
    assert any(not one.equal(other) for one, other in zip(before, after, strict=True))
    rewards = {"rewards", "student_rewards"} & set(inspect.signature(METHODS[method]).parameters)
    assert has_reward_head(found.model) == bool(rewards)
    assert {"trl", "fastpref", method} <= set(found.model.model_tags)


def test_refuses_a_method_that_reads_what_no_trainer_gives(monkeypatch):
    absent = [name for name in GIVEN if name not in ("ref_logps", "oracle_rewards")]
    monkeypatch.setattr("fastpref.integrations.trl.config.GIVEN", absent)
    got = "got 'edpo', which reads ref_logps and oracle_rewards"
    with pytest.raises(ValueError, match=rf"method: expected .*\(responses, .*\), {got}"):
        config("edpo")


@pytest.mark.parametrize("method", METHODS)
def test_options_are_the_losses_own(method):
    args, parameters = config(method), inspect.signature(METHODS[method]).parameters
    for name in OPTIONS[method]:
        assert getattr(args, name) == parameters[name].default
    for other in {name for names in OPTIONS.values() for name in names} - set(OPTIONS[method]):
        assert getattr(args, other) is None or other == "gamma"  # which the shaping has, too


@pytest.mark.parametrize("method", METHODS)
def test_help_is_the_docstrings(method):
    doc = re.sub(r"\s+", " ", METHODS[method].__doc__ or "").replace("``", "")
    for name in OPTIONS[method]:
        text = re.search(rf" {name}: (.*?\.) ", doc)[1]
        parts = [part for part in helps(PreferenceConfig)[name].split("[") if text in part]
        assert any(re.search(rf"\b{method}\b.*\]", part) for part in parts), name


def test_help_of_what_signals_need():
    found = helps(TVKDConfig)
    names = "potential value_temperature terminal form value_beta precompute_shaping"
    for name in names.split():
        assert re.fullmatch(r"\[tvkd\] [A-Z].{15,} If not set: .*\.", found[name]), name
    assert "[tvkd] Discount of the teacher's values. If not set: 1.0." in found["gamma"]
    assert "method" in helps(PreferenceConfig) and "method" not in found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tvkd", "beta": 0.0}, "beta: expected a finite number above 0"),
        ({"method": "dpo", "beta": 0}, "beta: expected a finite number above 0"),
        ({"method": "ipo", "beta": NAN}, "beta: expected a finite number"),
        ({"method": "tvkd", "alpha": -0.1}, "alpha: expected a finite number at least 0"),
        ({"method": "drdo", "alpha": -0.1}, "alpha: expected a finite number at least 0"),
        ({"method": "drdo", "gamma": -1.0}, "gamma: expected a finite number at least 0"),
        ({"method": "tvkd", "gamma": -1.0}, "gamma: expected a finite number at least 0"),
        ({"method": "tvkd", "sft_weight": NAN}, "sft_weight: expected a finite number"),
        ({"method": "oracle", "sft_weight": -1.0}, "sft_weight: expected .* at least 0"),
        ({"method": "dpo", "label_smoothing": 0.6}, "label_smoothing: expected .* at most 0.5"),
        ({"method": "edpo", "aggregate": "best"}, "aggregate: expected 'min_pair' or 'min_batch'"),
        ({"method": "tvkd", "value_temperature": 0.0}, "value_temperature: expected .* above 0"),
        ({"method": "tvkd", "length_normalize": "x"}, "length_normalize: expected True or False"),
        ({"method": "tvkd", "form": "best"}, "form: expected 'difference' or 'next_value'"),
        ({"method": "tvkd", "terminal": "zero"}, "terminal: expected 'bootstrap', or a gamma"),
        ({"method": "tvkd", "scratch_bytes": -1}, "scratch_bytes: expected"),
        ({"method": "dpo", "alpha": 1.0}, "alpha: expected None, since method 'dpo' has no such"),
        ({"method": "ipo", "reference_free": True}, "reference_free: expected None, since"),
        ({"method": "drdo", "potential": "max"}, "potential: expected None, since"),
        ({"method": "best"}, "method: expected .*'dpo' or 'ipo' or"),
        ({"method": []}, "method: expected a method, or several"),
        ({"method": ["dpo", "dpo"]}, "method: expected .* each of them once, got .'dpo', 'dpo'."),
        ({"method": ["dpo", "best"]}, "method: expected .*, got 'best'"),
        ({"method": ["dpo", "sft"], "method_weights": [1.0]}, "method_weights: expected 2 numbers"),
        ({"method": ["dpo", "sft"], "method_weights": [1.0, -1.0]}, "method_weights: .* at least"),
        ({"method": ["dpo", "sft"], "gamma": 1.0}, "gamma: expected None, since method .'dpo', 's"),
        ({"method": ["dpo", "sft"], "beta": -1.0}, "beta: expected a finite number above 0"),
        ({"method": ["sft", "gkd"]}, "lmbda: expected 0 beside other losses, .*, got 0.5"),
        ({"method": "gkd", "lmbda": 1.5}, "lmbda: expected a finite number .* at most 1"),
        ({"method": "gkd", "max_new_tokens": 0}, "max_new_tokens: expected .* at least 1"),
        ({"method": "gkd", "max_new_tokens": 2.5}, "max_new_tokens: expected a whole number"),
        ({"method": "gkd", "divergence": "kl"}, "divergence: expected 'jsd' or 'forward_kl' or"),
        ({"method": "gkd", "jsd_beta": 1.0}, "jsd_beta: expected a number above 0 and below 1"),
        ({"method": "gkd", "skew_alpha": 0.0}, "skew_alpha: expected a finite number above 0"),
        ({"method": "vanilla_kd", "lmbda": 0.5}, "lmbda: expected None, since method 'vanilla_kd'"),
        ({"method": "dpkd_token", "token_beta": 0.0}, "token_beta: expected .* above 0, got 0.0"),
        ({"method": "dpkd_token", "topk_tail": "drop"}, "topk_tail: expected None, since method"),
        ({"method": "adpa", "advantage_clip": [1.0]}, "advantage_clip: expected two numbers"),
        ({"method": "adpa", "advantage_clip": [1.0, 0.0]}, "advantage_clip: .* the least before"),
        ({"method": "kto", "per_device_train_batch_size": 1}, "per_device_train_batch_size: .* 2"),
        ({"method": "kto", "precompute_ref_log_probs": True}, "precompute_ref_log_probs: .*'kto'"),
        ({"method": "tdpo", "precompute_ref_log_probs": True}, "precompute_ref_log_probs: .*'tdpo"),
        ({"method": "dpo", "loss_type": ["ipo"]}, "loss_type: expected .'sigmoid'., since"),
    ],
)
def test_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_options_of_several_methods():
    """Each has its own default, where they differ and nobody said otherwise."""
    args = config(["dpo", "wpo", "tvkd"], label_smoothing=0.2)
    assert (args.beta, args.length_normalize, args.reference_free) == (None, False, True)
    betas = [args.options(method)["beta"] for method in args.methods]
    assert betas == [0.1, 0.01, 0.1]
    assert all(args.options(method)["label_smoothing"] == 0.2 for method in args.methods)
    assert all(config(["dpo", "wpo"], beta=0.5).options(one)["beta"] == 0.5 for one in args.methods)
    # The reference is DPO's; TVKD's own is optional, and there is none.
    assert args.has_reference() and "ref_logps" not in args.inputs("tvkd")
    assert "ref_logps" in config(["dpo", "tvkd"], reference_free=False).inputs("tvkd")
    assert config(["dpo"]).method == "dpo"


def test_no_signal_left_is_meant_with_a_discount_or_another_form():
    assert config("tvkd", terminal="zero", gamma=0.9).terminal == "zero"
    assert config("tvkd", terminal="zero", form="next_value").gamma == 1.0


def test_saved_arguments_are_loaded_again(tmp_path):
    for args in (TVKDConfig("x", beta=0.02, **SETTINGS), config("drdo", gamma=1.5)):
        torch.save(args, tmp_path / "training_args.bin")
        loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
        for field in dataclasses.fields(args):
            assert getattr(loaded, field.name) == getattr(args, field.name), field.name
        assert loaded.methods == args.methods and loaded.options(args.method) == args.options(
            args.method
        )
    again = dataclasses.replace(TVKDConfig("x", beta=0.02, **SETTINGS), alpha=0.5)
    assert (again.beta, again.alpha, again.method) == (0.02, 0.5, "tvkd")


def test_a_plain_dpo_config(tmp_path):
    """Our fields are at the method's defaults; DPO's own default of beta was not set by anyone."""
    settings = {"beta": 0.03, "max_length": 24}
    found = trainer(
        TVKDTrainer, DPOConfig, tmp_path, student(), settings=settings, train_dataset=DATA
    )
    assert (found.args.beta, found.args.alpha, found.args.max_length) == (0.03, 1.0, 24)
    assert isinstance(found.args, TVKDConfig) and found.args.reference_free
    assert "shaping/chosen" in history(found)[0]
    found = trainer(DRDOTrainer, DPOConfig, tmp_path, student(), train_dataset=DATA)
    assert (found.args.beta, found.args.alpha, found.args.gamma) == (None, 0.1, 2.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (DPOConfig("x", beta=0.5, **SETTINGS), "beta: expected None, since method 'drdo'"),
        (DPOConfig("x", use_weighting=True, **SETTINGS), "use_weighting: expected False"),
        (TrainingArguments("x", use_cpu=True), "args: expected a DRDOConfig or a DPOConfig, got"),
        (TVKDConfig("x", **SETTINGS), "args: expected method='drdo', got 'tvkd'"),
        (config("tvkd"), "args: expected method='drdo', got 'tvkd'"),
    ],
)
def test_arguments_of_something_else(args, message):
    with pytest.raises(ValueError, match=message):
        DRDOTrainer(student(), args=args, train_dataset=DATA)


def test_the_example_runs():
    (found,) = doctest.DocTestFinder().find(PreferenceConfig, "PreferenceConfig", globs={})[:1]
    assert found.examples and not doctest.DocTestRunner().run(found).failed


def test_without_arguments(tmp_path, monkeypatch):
    class OnCPU(TVKDConfig):
        def __init__(self, output_dir):
            super().__init__(output_dir, **SETTINGS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TVKDTrainer, "config_class", OnCPU)
    student().save_pretrained("student")
    TOKENIZER.save_pretrained("student")
    found = TVKDTrainer("student", train_dataset=DATA)
    assert (found.args.output_dir, found.args.method) == ("student-tvkd", "tvkd")


def head_below(model):
    """What our fused head runs: None for the model's own class."""
    return inspect.getclosurevars(model.forward.__func__).nonlocals["own"]


def test_one_fused_head_in_place_of_trls(tmp_path):
    options = {"settings": {"method": "dpo"}, "ref_model": student(seed=5)}
    found = trainer(PreferenceTrainer, PreferenceConfig, tmp_path, student(), **options)
    history(found)
    assert head_below(found.model) is None
    assert head_below(found.ref_model) is None


def test_hooks_of_accelerate_stay(tmp_path):
    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = student(), Counts()
    args = TVKDConfig(str(tmp_path), **SETTINGS | {"max_steps": 1})
    add_hook_to_module(model, hook)
    TVKDTrainer(model, args=args, train_dataset=DATA, processing_class=TOKENIZER).train()
    assert hook.calls == 1
