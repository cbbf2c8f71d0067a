"""Numbers of any size, as full logits have them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from every_function import Given, batch
from full_logits import EVERY, FULL
from holding import WAYS, hold_to_full_logits

from fastpref import Head

OF_MODELS = ("hidden", "states", "teacher", "logps", "values")
# A token of this logit has no share, even in float64, where the formulas of full logits know no
# -inf in their gradients.
LOW = -1e5
MASKED = torch.arange(20) >= 16


def scaled(size: float) -> Callable[[Given], Given]:
    def change(given: Given) -> Given:
        return given | {name: size * given[name] for name in OF_MODELS}

    return change


def with_head(**transform: float) -> Callable[[Given], Given]:
    return lambda given: given | {"transform": transform}


def at_temperature(temperature: float) -> Callable[[Given], Given]:
    return lambda given: given | {"options": {"temperature": temperature}}


def biased(size: float) -> Callable[[Given], Given]:
    return lambda given: given | {"bias": size * given["bias"]}


EXTREMES: dict[str, Callable[[Given], Given]] = {
    "logits of 1e4": scaled(1e4),
    "logits of 1e8": scaled(1e8),
    "a bias of 1e4": biased(1e4),
    "denormals": scaled(1e-42),
    "temperature 1e-3": at_temperature(1e-3),
    "temperature 1e3": at_temperature(1e3),
    "soft cap 1e-30": with_head(softcap=1e-30),
    "soft cap 1e30": with_head(softcap=1e30),
}


def test_every_function_is_here():
    assert FULL.keys() == EVERY.keys()


@pytest.mark.parametrize("extreme", EXTREMES)
def test_numbers_of_any_size(extreme):
    given = EXTREMES[extreme](batch() | {"transform": {}})
    for name, trained in WAYS:
        hold_to_full_logits(
            name, given, torch.float32, trained=trained, compact=not trained, as_full=given
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_beyond_float16(dtype):
    """Hidden states and head fit into float16, their products do not."""
    given = batch(dtype=torch.bfloat16) | {"transform": {}}
    for name in (*OF_MODELS, "weight", "of_teacher"):
        given[name] = 300 * given[name]
    given = {**given, "weight": given["weight"].half().bfloat16()}
    assert (given["hidden"].double() @ given["weight"].double().T).abs().max() > 2 * 65504
    for name, trained in WAYS:
        hold_to_full_logits(name, given, dtype, trained=trained, compact=trained, as_full=given)


def test_tokens_that_both_models_mask():
    def masked(value: float) -> Given:
        given = batch() | {"transform": {}}
        given["ids"] = torch.arange(16).view(4, 1, 4).expand(4, 3, 4)
        given["bias"].masked_fill_(MASKED, value)
        bias = torch.zeros(20).masked_fill_(MASKED, value)
        return given | {"of_teacher": Head(given["of_teacher"], bias)}

    given, low = masked(-torch.inf), masked(LOW)
    for name, trained in WAYS:
        hold_to_full_logits(
            name, given, torch.float32, trained=trained, compact=not trained, as_full=low
        )
