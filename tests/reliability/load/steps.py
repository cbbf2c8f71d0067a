"""A random step: one call, its gradients, and how far both are from full logits in float64."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import formulas
import torch
from calls import CALLS, VALUES, Function
from closeness import assert_no_worse
from every_function import flat
from problems import Given, Problem, drawn
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
LEAVES = ("states", "weight", "bias")


class Step(NamedTuple):
    name: str
    problem: Problem
    dtype: torch.dtype
    trained: bool  # the head, too
    gradient: bool
    autocast: bool  # to bfloat16

    def leaves(self, dtype: torch.dtype) -> Given:
        return self.problem.leaves(dtype, trained=self.trained)

    def call(self, function: Function, given: Given) -> list[Tensor]:
        """What a function returns, but for flags."""
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)
        with torch.set_grad_enabled(self.gradient), autocast:
            found = flat(function(self.problem, given))
        return [one for one in found if one.is_floating_point()]

    def finish(self, given: Given, found: list[Tensor]) -> list[Tensor]:
        """What `call` gave, and the gradients of all that wants one."""
        values = [one.detach() for one in found]
        return values + (gradients(given, found) if self.gradient else [])

    def run(self, function: Function, given: Given) -> list[Tensor]:
        """Both."""
        return self.finish(given, self.call(function, given))

    def ours(self, given: Given | None = None) -> list[Tensor]:
        """By fastpref; of fresh leaves, if none are given."""
        given = self.leaves(self.dtype) if given is None else given
        return self.run(CALLS[self.name].ours, given)

    def hold(self, found: list[Tensor]) -> None:
        """Refuse ``found`` where it is worse than full logits in the same dtype."""
        plain, leaves = CALLS[self.name].plain, self.leaves(torch.float64)
        exact, nearby = (self.run(plain, one) for one in (leaves, moved(leaves)))
        rough = self.run(plain, self.leaves(self.dtype))
        dtype = torch.bfloat16 if self.autocast and self.dtype != torch.float64 else self.dtype
        size = 0.0
        if self.name.startswith("linear_cached_kl"):
            # A difference of numbers of the size of the logits, as its docstring says.
            size = float(formulas.logits(*self.problem.student(leaves)).detach().abs().max())
        for one, *others in zip(found, rough, nearby, exact, strict=True):
            hold(one, *others, dtype, size)


def drawn_step(chance: random.Random, names: Iterable[str] = tuple(CALLS)) -> Step:
    name = chance.choice(list(names))
    dtype = chance.choice(DTYPES)
    return Step(
        name, drawn(chance), dtype, chance.random() < 0.5,
        name not in VALUES and chance.random() < 0.8,
        chance.random() < 0.15 and dtype != torch.float16,
    )  # fmt: skip


def gradients(given: Given, found: list[Tensor]) -> list[Tensor]:
    """Of the sum of all numbers, each with a weight of its own; zeros where there is none."""
    wanted = [given[name] for name in LEAVES if name in given and given[name].requires_grad]
    values = [one for one in found if one.requires_grad]
    weights = [torch.linspace(0.5, 1.5, one.numel()).view(one.shape).to(one) for one in values]
    if not values:
        return [torch.zeros_like(one) for one in wanted]
    return list(
        torch.autograd.grad(values, wanted, weights, allow_unused=True, materialize_grads=True)
    )


def moved(given: Given) -> Given:
    """Leaves but for errors that float32 would not notice."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (one * (1 + 2.0**-20 * torch.randn(one.shape, generator=generator)))
        .detach()
        .requires_grad_(one.requires_grad)
        for name, one in given.items()
    }


def hold(
    found: Tensor, plain: Tensor, nearby: Tensor, exact: Tensor, dtype: torch.dtype, size: float
) -> None:
    """`assert_no_worse`, and than the formula itself where plain PyTorch was exact by luck.

    Numbers that are differences of others of some ``size`` have the roundoff of these.
    """
    if dtype == torch.float64:
        # Relative to the largest number, for those that are next to nothing beside it.
        largest = max(size, float(exact.abs().max())) if exact.numel() else 0.0
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10 * (1 + largest))
        return
    rough = max(plain, nearby, key=lambda one: float((one.double() - exact).norm()))
    perfect = exact.new_tensor([size + 1e-6])
    values = (torch.cat((one.reshape(-1).double(), perfect)) for one in (found, rough, exact))
    assert_no_worse(*values, dtype)
