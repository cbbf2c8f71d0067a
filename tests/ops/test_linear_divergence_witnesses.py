"""TRL's chunked divergence and Liger's say the same, where each has the kind."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from closeness import assert_no_worse
from torch import Tensor

from fastpref import Head
from fastpref.ops import linear_divergence

ROWS, VOCAB, WIDTH, TEACHER_WIDTH = 12, 70, 16, 24


def batch(dtype: torch.dtype, *, trained: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,)
    teacher = (ROWS, TEACHER_WIDTH), (VOCAB, TEACHER_WIDTH), (VOCAB,)
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes + teacher]
    for tensor, wants in zip(tensors, (True, trained, trained), strict=False):
        tensor.requires_grad_(wants)
    return tensors


def ours(tensors: list[Tensor], **options: Any) -> Tensor:
    hidden, weight, bias, teacher, teacher_weight, teacher_bias = tensors
    caps = options.pop("caps", ((1.0, None), (1.0, None)))
    heads = Head(weight, bias, *caps[0]), Head(teacher_weight, teacher_bias, *caps[1])
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    return linear_divergence(hidden, heads[0], teacher, heads[1], labels, **options)


def gradients(values: Tensor, tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
    wanted = [one for one in tensors if one.requires_grad]
    total = (values * weights.to(values.dtype)).sum()
    return [values.detach(), *torch.autograd.grad(total, wanted)]


def hold_to_each_other(run: Any) -> None:
    """Of (dtype, ours or theirs): neither is further from float64 than the other."""
    exact, found, theirs = run(torch.float64, True), run(torch.float32, True), None
    theirs = run(torch.float32, False)
    for one, witness, expected in zip(found, theirs, exact, strict=True):
        assert_no_worse(one, witness, expected, torch.float32)
        torch.testing.assert_close(witness, one, rtol=2e-4, atol=2e-6)


@pytest.fixture(scope="module")
def trl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported package, none of ours
        module = pytest.importorskip("trl.kernels.chunked_divergence", reason="no trl >= 1.16")
    return module.ChunkedDivergenceFunction


@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.1)]
)
@pytest.mark.parametrize("trained", [False, True])
def test_equals_trl(trl, trained, kind, beta):
    """With any upstream gradient, soft caps and logit scales."""
    weights = torch.linspace(-1, 2, ROWS)
    caps = ((0.5, 4.0), (0.7, 6.0))

    def run(dtype: torch.dtype, is_ours: bool) -> list[Tensor]:
        tensors = batch(dtype, trained=trained)
        if is_ours:
            options = {"beta": beta} if kind == "jsd" else {}
            values = ours(tensors, kind=kind, temperature=1.3, caps=caps, **options)
        else:
            values, _ = trl.apply(*tensors, beta, 1.3, *caps[0], *caps[1])
        return gradients(values, tensors, weights)

    hold_to_each_other(run)


@pytest.fixture(scope="module")
def liger() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported package, none of ours
        chunked_loss = pytest.importorskip(
            "liger_kernel.chunked_loss", reason="liger-kernel is not installed"
        )
    return chunked_loss.LigerFusedLinearJSDLoss


@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.1)]
)
def test_equals_liger(liger, kind, beta):
    """Which averages over tokens, and always has a gradient of the head."""

    def run(dtype: torch.dtype, is_ours: bool) -> list[Tensor]:
        tensors = batch(dtype, trained=True)
        hidden, weight, bias, teacher, teacher_weight, teacher_bias = tensors
        if is_ours:
            options = {"beta": beta} if kind == "jsd" else {}
            loss = ours(tensors, kind=kind, temperature=1.3, **options).mean()
        else:
            labels = torch.zeros(ROWS, dtype=torch.int64)
            witness = liger(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=1.3,
                compiled=False,
            )  # fmt: skip
            loss = witness(hidden, weight, teacher, teacher_weight, labels, bias, teacher_bias)
        return gradients(loss, tensors, torch.ones(()))

    hold_to_each_other(run)
