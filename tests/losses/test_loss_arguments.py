"""What losses of responses refuse, in words that name the argument."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from fastpref import Responses
from fastpref.checks import check_options, options_of
from fastpref.losses import METHODS
from fastpref.responses import Tokens

META = torch.device("meta")
UNPAIRED = ("sft", "seqkd", "vanilla_kd", "gkd", "dpkd_token", "kto")
OF_HALF = (
    ("adpa", "advantages"),
    *((method, "divergences") for method in ("vanilla_kd", "gkd", "dpkd_token")),
)


def loss_arguments(method: str) -> dict[str, Any]:
    """Two pairs that a method accepts, by name."""
    tensors = get_type_hints(METHODS[method])
    return {
        name: torch.zeros(2 if (method, name) in OF_HALF else 4).to(
            torch.bool if name == "desirable" else torch.float32
        )
        for name, parameter in inspect.signature(METHODS[method]).parameters.items()
        if tensors[name] is Tensor and parameter.default is parameter.empty
    }


def responses_of(method: str, count: int = 4) -> Responses:
    first = next(iter(inspect.signature(METHODS[method]).parameters))
    count = count // 2 if first == "chosen" else count
    return Responses(-torch.ones(count), torch.ones(count, dtype=torch.int64))


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_refuses_what_is_no_responses(method):
    given = loss_arguments(method)
    METHODS[method](responses_of(method), **given)
    with pytest.raises(ValueError, match="expected Responses, from sum_responses, got Tensor"):
        METHODS[method](torch.zeros(4), **given)
    expected = "at least one response" if method in UNPAIRED else "2B responses, .*"
    with pytest.raises(ValueError, match=f"expected {expected}, got 0"):
        METHODS[method](responses_of(method, 0), **given)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in (*UNPAIRED, "oracle")])
def test_a_loss_refuses_an_odd_number_of_responses(method):
    with pytest.raises(ValueError, match="responses: expected 2B responses, .* got 3"):
        METHODS[method](responses_of(method, 3), **loss_arguments(method))


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in METHODS for name in loss_arguments(method)]
)
def test_a_loss_refuses_tensors_that_do_not_fit(method, name):
    good = loss_arguments(method)[name]
    bad = {
        "(2, 3)": good.new_zeros(2, 3),
        "(0,)": good[:0],
        "(1, 4, 1)": good.new_zeros(1, 4, 1),
        "(0, 4)": good.new_zeros(0, 4),
        "list": good.tolist(),
        "torch.int64": good.long(),
        "meta": good.to(META),
    }
    if name != "kl_log_ratios":  # of which there is any number
        bad["(3,)"] = good.new_zeros(3)
    for got, value in bad.items():
        given = loss_arguments(method) | {name: value}
        with pytest.raises(ValueError, match=f"^{name}: expected .*got {re.escape(got)}"):
            METHODS[method](responses_of(method), **given)


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in METHODS for name in options_of(METHODS[method])],
)
def test_a_loss_refuses_options_before_a_trainer_starts(method, name):
    annotation = options_of(METHODS[method])[name]
    bad, expected = math.nan, "a finite number"
    if annotation is bool:
        bad, expected = "no", "True or False"
    elif get_origin(annotation) is Literal:
        bad, expected = "no", " or ".join(map(repr, get_args(annotation)))
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}"):
        check_options(METHODS[method], {name: bad})
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}"):
        METHODS[method](responses_of(method), **loss_arguments(method), **{name: bad})


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_refuses_arguments_that_it_does_not_have(method):
    given = loss_arguments(method)
    with pytest.raises(TypeError, match=rf"{method}\(\).*temprature"):
        METHODS[method](responses_of(method), **given, temprature=1.0)
    with pytest.raises(TypeError, match=rf"{method}\(\)"):
        METHODS[method](responses_of(method), *[torch.zeros(4)] * 9)
    if given:
        name, value = next(iter(given.items()))
        with pytest.raises(TypeError, match=rf"{method}\(\).*{name}"):
            METHODS[method](responses_of(method), value, **{name: value})


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in METHODS for name in loss_arguments(method)]
)
@pytest.mark.parametrize("summed", [True, False], ids=["responses", "tokens"])
def test_a_loss_refuses_nothing_for_what_it_needs(method, name, summed):
    responses = responses_of(method)
    if not summed:
        responses = Tokens(-torch.ones(len(responses.logps), 1), torch.ones(4, 1) > 0, None, None)
        responses = responses._replace(mask=responses.logps < 0)
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor, got NoneType"):
        METHODS[method](responses, **loss_arguments(method) | {name: None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_flags_of_another_dtype(dtype):
    given = loss_arguments("kto") | {"desirable": torch.ones(4, dtype=dtype)}
    with pytest.raises(ValueError, match=f"^desirable: expected bool, got {dtype}"):
        METHODS["kto"](responses_of("kto"), **given)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_takes_options_by_name_alone(method):
    with pytest.raises(TypeError, match=rf"{method}\(\)"):
        METHODS[method](responses_of(method), *loss_arguments(method).values(), 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_refuses_responses_that_are_no_vectors(method):
    good = responses_of(method)
    for bad, expected in (
        (good._replace(logps=good.logps.unsqueeze(1)), "logps: expected shape"),
        (good._replace(logps=good.logps.tolist()), "logps: expected a tensor"),
        (good._replace(lengths=good.lengths[:1]), "lengths: expected shape"),
        (good._replace(unweighted_logps=good.logps[:1]), "unweighted_logps: expected shape"),
    ):
        with pytest.raises(ValueError, match=expected):
            METHODS[method](bad, **loss_arguments(method))
