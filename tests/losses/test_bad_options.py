"""Numbers, flags and names that an option does not take are refused."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest
import torch
from bad_input import HEADED, LOSSES, OF_PAIRS, arguments, call, refused

import fastpref

NUMBERS = [
    *((name, "temperature", (0, -1.0)) for name in HEADED),
    *((name, "softcap", (0.0, -30)) for name in HEADED),
    *((name, "logit_scale", ()) for name in HEADED),
    ("tvkd_loss", "beta", (0, -0.1)),
    ("tvkd_loss", "alpha", (-0.1,)),
    ("tvkd_loss", "label_smoothing", (-0.1, 0.9)),
    ("tvkd_loss", "sft_weight", (-1,)),
    ("drdo_loss", "alpha", (-0.1,)),
    ("drdo_loss", "gamma", (-1,)),
    ("teacher_shaping", "gamma", (-1,)),
    ("shaping_from_values", "gamma", (-0.5,)),
]
NEVER = (math.nan, math.inf, -math.inf, "1", True, torch.tensor(1.0))


@pytest.mark.parametrize(("name", "argument", "out"), NUMBERS)
def test_numbers_that_are_not_finite_or_out_of_range(name, argument, out):
    for value in (*NEVER, *out):
        got = str(value) if isinstance(value, (int, float)) else repr(value)
        refused(name, argument, "a finite number", got, **{argument: value})


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name, argument, _ in NUMBERS])
def test_numbers_of_tensors(name, argument):
    value = torch.tensor(0.5)
    refused(name, argument, "(use .item())", repr(value), **{argument: value})


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name, argument, _ in NUMBERS])
def test_real_numbers_of_other_kinds(name, argument):
    for kind in (numpy.float32, numpy.float64, Fraction):
        given = arguments(name) | {argument: 0.5}
        expected = call(name, given)
        found = call(name, given | {argument: kind(0.5)})
        torch.testing.assert_close(found, expected)


FLAGS = [
    *((name, "compact") for name in ("linear_logps", *LOSSES, "teacher_shaping")),
    *((name, "length_normalize") for name in LOSSES),
    ("drdo_loss", "detach_focal"),
]


@pytest.mark.parametrize(("name", "argument"), FLAGS)
def test_flags_that_are_not_true_or_false(name, argument):
    for value in ("no", 0, None, 1.0):
        refused(name, argument, "True or False", repr(value), **{argument: value})


@pytest.mark.parametrize("name", ["linear_logps", *OF_PAIRS])
def test_an_ignore_index_that_is_no_integer(name):
    for value in (None, -100.0, "a", True):
        refused(name, "ignore_index", "an integer", repr(value), ignore_index=value)


@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
def test_scratch_bytes_that_are_no_size(name):
    for value in (-1, 1.5, True, math.inf):
        refused(name, "scratch_bytes", "a whole number of bytes", repr(value), scratch_bytes=value)


@pytest.mark.parametrize("name", ["teacher_shaping", "shaping_from_values"])
def test_unknown_conventions(name):
    for value in ("end", "", None):
        refused(name, "terminal", "'bootstrap' or 'zero'", repr(value), terminal=value)
        refused(name, "form", "'difference' or 'next_value'", repr(value), form=value)


@pytest.mark.parametrize("name", [*HEADED, *OF_PAIRS])
def test_an_unknown_keyword(name):
    with pytest.raises(TypeError, match=rf"{name}\(\).*temprature"):
        getattr(fastpref, name)(**arguments(name), temprature=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_return_the_lse(name):
    with pytest.raises(TypeError, match=rf"{name}\(\).*return_lse"):
        getattr(fastpref, name)(**arguments(name), return_lse=True)
