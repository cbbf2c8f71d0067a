"""The operators that losses are made of, as PyTorch expects operators to be."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from fastpref.losses import METHODS
from fastpref.losses.fused import FUSED, pair_losses_op
from fastpref.ops.backend import uses_triton
from fastpref.responses import Tokens
from fastpref.sequences import _checked_boundaries

needs_triton = pytest.mark.skipif(
    not uses_triton(torch.zeros(1)), reason="the pair kernels need TRITON_INTERPRET=1 or a GPU"
)

LABELS = torch.tensor([1, 2, -100, 3, -100, 4, 5, -100, -100])
BOUNDARIES = torch.tensor([0, 3, 5, 8, 9])
MASK = LABELS != -100


def logps() -> torch.Tensor:
    return (-torch.rand(9)).requires_grad_()


@needs_triton
@pytest.mark.parametrize("loss", FUSED)
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_pair_losses(loss, optional):
    given = (None, None, None)
    if optional:
        given = (torch.rand(9), torch.randn(4, requires_grad=True), torch.randn(4))
    opcheck(pair_losses_op, (loss, logps(), MASK, BOUNDARIES, *given, 0.1, 2.0, 0.3, optional))


@needs_triton
@pytest.mark.parametrize("loss", FUSED)
@pytest.mark.parametrize("constant", [True, False])
def test_the_kernel_runs_where_it_has_every_gradient(loss, constant, monkeypatch):
    calls = []
    fused = FUSED[loss]
    monkeypatch.setitem(FUSED, loss, lambda *a, **k: calls.append(1) or fused(*a, **k))
    tokens = Tokens(logps(), MASK, BOUNDARIES, None)
    others = {"tvkd": "ref_logps", "drdo": "oracle_rewards"}
    given = {others[loss]: torch.randn(4, requires_grad=not constant)}
    found = METHODS[loss](tokens, torch.randn(4, requires_grad=True), **given)
    assert len(calls) == constant
    expected = METHODS[loss](tokens.sums(), torch.zeros(4), **given)
    assert torch.equal(found.chosen_logps, expected.chosen_logps)


@needs_triton
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("tvkd", {"sft_weight": 0.5, "label_smoothing": 0.1}),
        ("tvkd", {"length_normalize": True, "ref_logps": torch.tensor([-1.0, -0.5, -0.2, -3.0])}),
        ("tvkd", {"alpha": 0.0}),
        ("drdo", {"detach_focal": False}),
        ("drdo", {"detach_focal": True, "length_normalize": True}),
    ],
)
def test_every_output_and_gradient_is_that_of_pytorch(loss, options):
    values, x = -torch.rand(9), torch.randn(4, requires_grad=True)
    given = {"oracle_rewards": torch.randn(4)} if loss == "drdo" else {}

    def run(summed: bool) -> list[torch.Tensor]:
        leaf = values.clone().requires_grad_()
        tokens = Tokens(leaf, MASK, BOUNDARIES, None)
        found = METHODS[loss](tokens.sums() if summed else tokens, x, **given, **options)
        wanted = torch.autograd.grad(found.loss, (leaf, x), materialize_grads=True)
        return [*(one.detach() for one in found), *wanted]

    for one, other in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(one, other)


@needs_triton
def test_shapes_are_known_without_values():
    given = (logps().detach(), MASK, BOUNDARIES, torch.rand(9), torch.randn(4), torch.randn(4))
    real = pair_losses_op("tvkd", *given, 0.1, 2.0, 0.3, True)
    with FakeTensorMode() as mode:
        fake = pair_losses_op("tvkd", *map(mode.from_tensor, given), 0.1, 2.0, 0.3, True)
    shapes = [[(one.shape, one.dtype) for one in found] for found in (real, fake)]
    assert shapes[0] == shapes[1]


@needs_triton
@pytest.mark.parametrize("loss", FUSED)
def test_second_derivatives_and_transforms_are_refused(loss):
    """Saved derivatives would count as constants, and a gradient penalty as nothing."""
    x = torch.randn(4, requires_grad=True)
    others = {"oracle_rewards": torch.randn(4)} if loss == "drdo" else {}
    tokens = Tokens(logps().detach(), MASK, BOUNDARIES, None)

    def total(x: torch.Tensor) -> torch.Tensor:
        return METHODS[loss](tokens, x, **others).loss

    (gradient,) = torch.autograd.grad(total(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"fastpref\.losses\.tvkd, drdo .*: second deriv"):
        gradient.square().sum().backward()
    with pytest.raises(NotImplementedError, match=rf"fastpref\.losses\.{loss} .*: torch\.func"):
        torch.func.grad(total)(x)


def test_opcheck_checked_boundaries():
    opcheck(_checked_boundaries, (BOUNDARIES, LABELS, -100))
