"""Other dtypes and devices than those of the other arguments are refused."""

from __future__ import annotations

import pytest
import torch
from bad_input import HEADED, LOSSES, OF_PAIRS, PER_SEQUENCE, arguments, refused
from torch import Tensor


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("argument", ["weight", "bias"])
def test_a_head_of_another_dtype(name, argument):
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        value = torch.zeros((20, 8) if argument == "weight" else 20, dtype=dtype)
        refused(name, argument, "torch.float32, like hidden", str(dtype), **{argument: value})


@pytest.mark.parametrize("name", [*HEADED, "sequence_rewards"])
def test_hidden_that_is_not_floating(name):
    for dtype in (torch.int64, torch.bool, torch.complex64):
        hidden = torch.zeros(arguments(name)["hidden"].shape, dtype=dtype)
        refused(name, "hidden", "float64, float32, float16 or bfloat16", str(dtype), hidden=hidden)


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [
        *((name, "weight", (20, 8)) for name in HEADED),
        *((name, "bias", (20,)) for name in HEADED),
        *((name, argument, (4,)) for name, argument in PER_SEQUENCE),
        ("tvkd_loss", "token_weights", (4, 3)),
        ("shaping_from_values", "values", (4, 4)),
        ("sequence_rewards", "head_weight", (1, 8)),
        ("sequence_rewards", "head_bias", (1,)),
    ],
)
def test_numbers_that_are_not_floating(name, argument, shape):
    for dtype in (torch.int64, torch.complex64):
        changes = {argument: torch.zeros(shape, dtype=dtype)}
        refused(name, argument, "float64, float32, float16 or bfloat16", str(dtype), **changes)


@pytest.mark.parametrize("name", ["linear_logps", *OF_PAIRS])
def test_labels_that_are_not_integers(name):
    for dtype in (torch.float32, torch.bool):
        refused(name, "labels", "integer", str(dtype), labels=torch.zeros(4, 3, dtype=dtype))


@pytest.mark.parametrize("name", ["linear_logps", *OF_PAIRS])
def test_labels_that_are_no_tensor(name):
    refused(name, "labels", "a tensor", "list", labels=[[1, 2], [3, 4]])


@pytest.mark.parametrize(("name", "argument"), PER_SEQUENCE)
def test_a_number_a_sequence_that_is_no_tensor(name, argument):
    refused(name, argument, "a tensor", "list", **{argument: [0.0] * 4})


META = torch.device("meta")


@pytest.mark.parametrize(
    ("name", "argument", "like"),
    [
        *((name, "weight", "hidden") for name in HEADED),
        *((name, "bias", "hidden") for name in HEADED),
        *((name, "labels", "hidden") for name in ("linear_logps",)),
        *((name, argument, "labels") for name, argument in PER_SEQUENCE),
        ("tvkd_loss", "token_weights", "labels"),
        ("teacher_shaping", "hidden", "labels"),
        ("shaping_from_values", "values", "labels"),
        ("sequence_rewards", "hidden", "labels"),
        ("sequence_rewards", "head_weight", "hidden"),
        ("sequence_rewards", "head_bias", "hidden"),
    ],
)
def test_another_device(name, argument, like):
    optional = {
        "weight": torch.zeros(20, 8),
        "bias": torch.zeros(20),
        "ref_logps": torch.zeros(4),
        "token_weights": torch.zeros(4, 3),
        "head_bias": torch.zeros(1),
    }
    value: Tensor = {**optional, **arguments(name)}[argument]
    refused(name, argument, f"cpu, like {like}", "meta", **{argument: value.to(META)})


@pytest.mark.parametrize("name", LOSSES)
def test_hidden_on_another_device(name):
    hidden = torch.zeros(4, 3, 8, device=META)
    refused(name, "labels", "meta, like hidden", "cpu", hidden=hidden)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", LOSSES)
def test_labels_on_another_device(name, packed):
    labels = arguments(name, packed=packed)["labels"].to(META)
    refused(name, "labels", "cpu, like hidden", "meta", packed=packed, labels=labels)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_cu_seqlens_on_another_device(name):
    boundaries = torch.zeros(5, dtype=torch.int64, device=META)
    refused(name, "cu_seqlens", "cpu, like labels", "meta", packed=True, cu_seqlens=boundaries)
