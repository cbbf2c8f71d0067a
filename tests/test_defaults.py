"""What users get who leave options out: papers' values, and the same everywhere."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import fastpref
import fastpref.teacher
from fastpref.losses import METHODS

# What any function that takes one of these has.
COMMON = {
    "ignore_index": -100,
    "compact": True,
    "temperature": 1.0,
    "teacher_temperature": None,
    "cu_seqlens": None,
    "scratch_bytes": None,
    "max_length": None,
    "batch_size": 8,
    "terminal": "bootstrap",
    "form": "difference",
    "potential": "value",
    "tail": "bucket",
    "per_token": False,
    "skip_bad_rows": False,
}
OWN = {
    "adpa": {"weight": 1.6, "sft_weight": 1.0},
    "cpo": {"beta": 0.1, "sft_weight": 1.0, "label_smoothing": 0.0},
    "vanilla_kd": {"weight": 1.0, "sft_weight": 0.0},
    "gkd": {"weight": 1.0, "sft_weight": 0.0},
    "dckd": {"chosen_weight": 0.1, "rejected_weight": 0.1, "sft_weight": 1.0},
    "dpkd": {"beta": 0.1, "length_normalize": True},
    "dpkd_token": {"weight": 0.5, "sft_weight": 0.5},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "ipo": {"beta": 0.1, "length_normalize": True},
    "drdo": {"alpha": 0.1, "gamma": 2.0, "length_normalize": False, "detach_focal": False},
    "edpo": {"beta": 0.1, "gamma": 0.0, "aggregate": "min_pair"},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "oracle": {"sft_weight": 0.1},
    "orpo": {"beta": 0.1, "sft_weight": 1.0},
    "sft": {},
    "seqkd": {},
    "simpo": {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0, "sft_weight": 0.0},
    "tdpo": {"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
    "tvkd": {
        "beta": 0.1,
        "alpha": 1.0,
        "ref_logps": None,
        "length_normalize": False,
        "label_smoothing": 0.0,
        "sft_weight": 0.0,
    },
    "wpo": {"beta": 0.01, "clamp": True, "label_smoothing": 0.0},
    "Head": {"bias": None, "logit_scale": 1.0, "softcap": None, "group": None},
    "linear_divergence": {
        "beta": 0.5,
        "alpha": 0.1,
        "detach_mixture": False,
        "reference_hidden": None,
        "reference_head": None,
        "clip": None,
    },
    "linear_stats": {"labels": None},
    "linear_token_preference": {"beta": 0.1},
    "sequence_rewards": {"head_bias": None},
    "sum_responses": {"token_weights": None},
    "shaping_from_values": {"gamma": 1.0},
    "teacher_shaping": {
        "gamma": 1.0,
        "reference_hidden": None,
        "reference_head": None,
        "beta": 0.1,
    },
    "add_shaping": {
        "gamma": 1.0,
        "reference": None,
        "reference_tokenizer": None,
        "beta": 0.1,
    },
    "add_kd_cache": {
        "student": None,
        "top_k": None,
        "teacher_tokenizer": None,
        "chosen_only": False,
    },
    "load_teacher": {"dtype": "auto", "device_map": None},
    "read_rows": {"split": "train"},
    "Responses": {"unweighted_logps": None},
}
OWN["tvkd_loss"] = OWN["tvkd"] | {"token_weights": None}
OWN["drdo_loss"] = OWN["drdo"]
OWN["linear_divergence_with_stats"] = OWN["linear_divergence"]
FUNCTIONS: dict[str, Any] = {
    name: getattr(module, name)
    for module in (fastpref, fastpref.teacher)
    for name in module.__all__
    if callable(getattr(module, name)) and not name.endswith("Error")
} | dict(METHODS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defaults(name):
    found = {
        option: parameter.default
        for option, parameter in inspect.signature(FUNCTIONS[name]).parameters.items()
        if parameter.default is not parameter.empty
    }
    common = {option: COMMON[option] for option in found if option in COMMON}
    assert found == common | OWN.get(name, {})
