"""Run a function of the tables on a changed batch, and hold it to full logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from batches import hold_difference
from every_function import FROZEN, Given, flat, leaves_of
from full_logits import EVERY, FULL, TRAINED
from torch import Tensor

from fastpref import Head

Change = Callable[[Given], Given]
# A function's name, and whether the head trains.
WAYS = [*((name, False) for name in EVERY), *((name, True) for name in TRAINED)]
# As much of 1 as float64 has lost when it takes the logarithm of a probability.
FLOAT64_LOSES = 1e-9


def cast(given: Given, dtype: torch.dtype) -> Given:
    """The same numbers in another dtype."""

    def one(value: object) -> object:
        if isinstance(value, Head):
            return Head(*(part.to(dtype) for part in value[:2]), *value[2:])
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return {name: one(value) for name, value in given.items()}


def leaves(name: str, trained: bool) -> list[str]:
    """What gets a gradient."""
    return list(leaves_of(trained and name in TRAINED)) if name in TRAINED | FROZEN else []


def results(
    function: Callable[[Given], object],
    given: Given,
    wanted: list[str],
    differentiable: list[bool] | None = None,
) -> tuple[list[Tensor], list[bool]]:
    """What a function returns, and the gradients of it; and which outputs have one."""
    given = given | {name: given[name].clone().requires_grad_() for name in wanted}
    outputs = flat(function(given))
    if differentiable is None:
        differentiable = [one.requires_grad for one in outputs]
    if not wanted:
        return outputs, differentiable
    total = outputs[0].new_zeros(())
    for one, counts in zip(outputs, differentiable, strict=False):
        if counts:  # each number with another weight
            weights = torch.linspace(0.5, 1.5, one.numel(), dtype=torch.float64)
            total = total + (weights.view(one.shape).to(one.dtype) * one).sum()
    gradients = torch.autograd.grad(total, [given[name] for name in wanted], materialize_grads=True)
    return [*(one.detach() for one in outputs), *gradients], differentiable


def hold_to_full_logits(
    name: str, given: Given, dtype: torch.dtype, *, trained: bool, compact: bool, as_full: Given
) -> None:
    """Values and gradients, against full logits of ``as_full`` in float64 and in float32."""
    wanted = leaves(name, trained)
    count = len(FULL[name](cast(as_full, torch.float64)))  # of losses, their values alone

    def ours(changed: Given) -> list[Tensor]:
        return flat(EVERY[name](changed, compact))[:count]

    found, differentiable = results(ours, cast(given, dtype), wanted)
    exact, plain = (
        results(FULL[name], cast(as_full, one), wanted, differentiable)[0]
        for one in (torch.float64, torch.float32)
    )
    for one, rough, right in zip(found, plain, exact, strict=True):
        assert right.isfinite().all(), name
        assert one.isfinite().all(), name
        try:
            hold_difference(one, rough, right, dtype, FLOAT64_LOSES)
        except AssertionError as error:
            raise AssertionError(f"{name}, {trained=}, {compact=}: {error}") from None
