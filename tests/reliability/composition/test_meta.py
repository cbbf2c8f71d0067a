"""Fake and meta tensors: the shapes, dtypes and devices of the real thing, without its numbers."""

from __future__ import annotations

import pytest
import torch
from every_function import (
    EVERY,
    WITH_GRADIENT,
    batch,
    flat,
    gradients,
    leaves_of,
    loss_batch,
    total,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastpref
from fastpref import Responses
from fastpref.losses import METHODS


def kinds(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(one.shape, one.dtype) for one in tensors]


def moved(given: dict[str, Tensor], mode: FakeTensorMode | None) -> dict[str, Tensor]:
    """A batch on the meta device, or fake in a mode; what wants a gradient still does."""
    return {
        name: one.detach().to("meta").requires_grad_(one.requires_grad)
        if mode is None
        else mode.from_tensor(one)
        for name, one in given.items()
    }


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_values(name, compact):
    with torch.no_grad():
        given = batch(dtype=torch.bfloat16)
        expected = kinds(flat(EVERY[name](given, compact)))
        on_meta = flat(EVERY[name](moved(given, None), compact))
        assert kinds(on_meta) == expected
        assert {one.device.type for one in on_meta} == {"meta"}
        if not compact:
            return
        with FakeTensorMode() as mode:
            fake = flat(EVERY[name](moved(given, mode), compact))
    assert kinds(fake) == expected
    assert {one.device.type for one in fake} == {"cpu"}
    assert all(isinstance(one, FakeTensor) for one in fake)


@pytest.mark.parametrize(("name", "trained"), WITH_GRADIENT)
def test_gradients(name, trained):
    given = batch(trains=leaves_of(trained))
    expected = kinds(gradients(given, total(EVERY[name](given, True))))
    on_meta = moved(given, None)
    assert kinds(gradients(on_meta, total(EVERY[name](on_meta, True)))) == expected
    if name.endswith("_with_stats"):  # takes longest, for no other operator
        return
    with FakeTensorMode() as mode, torch.autocast("cpu", dtype=torch.bfloat16):
        fake = moved(given, mode)
        assert kinds(gradients(fake, total(EVERY[name](fake, True)))) == expected


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_sums(method):
    responses, given = loss_batch(method, torch.float32)

    def loss(move: str) -> list[Tensor]:
        tensors = {name: one for name, one in given.items() if isinstance(one, Tensor)}
        changed = given | {name: one.to(move) for name, one in tensors.items()}
        return flat(METHODS[method](Responses(*(one.to(move) for one in responses)), **changed))

    assert kinds(loss("meta")) == kinds(loss("cpu"))


@pytest.mark.parametrize("compact", [True, False])
def test_packed_sequences(compact):
    labels = torch.tensor([1, 2, -100, 3, -100, 4, -100, 5, -100])
    boundaries = torch.tensor([0, 3, 5, 7, 9])
    given = (torch.randn(9, 8), torch.randn(20, 8), labels, torch.zeros(4), boundaries)

    def loss(hidden, weight, labels, shaping, cu_seqlens):
        options = {"cu_seqlens": cu_seqlens, "compact": compact}
        rewards = fastpref.sequence_rewards(hidden, labels, weight[:1], cu_seqlens=cu_seqlens)
        values = fastpref.teacher_shaping(hidden, weight, labels, **options)
        return flat(
            (fastpref.tvkd_loss(hidden, weight, labels, shaping, **options), rewards)
        ), values

    real, values = loss(*given)
    on_meta, values_on_meta = loss(*(one.to("meta") for one in given))
    assert kinds([*on_meta, values_on_meta]) == kinds([*real, values])


def test_tensors_of_two_devices_are_refused_in_our_words():
    given = batch()
    given["labels"] = given["labels"].to("meta")
    with pytest.raises(ValueError, match="labels: expected device cpu, like hidden, got meta"):
        EVERY["linear_logps"](given, True)
    given = batch()
    given["weight"] = given["weight"].to("meta")
    with pytest.raises(ValueError, match="weight: expected device cpu, like hidden, got meta"):
        EVERY["linear_logps"](given, True)


def test_wrong_shapes_are_refused_on_meta_too():
    given = moved(batch(), None)
    given["weight"] = given["weight"][:, 1:]
    with pytest.raises(ValueError, match=r"weight: expected shape \(V, 8\)"):
        EVERY["linear_logps"](given, True)
