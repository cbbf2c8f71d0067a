"""`torch.func`, forward mode and second derivatives: refused in fastpref's words, or right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_function import (
    HEADED,
    WITH_GRADIENT,
    batch,
    flat,
    gradients,
    leaves_of,
    loss_batch,
    same_bits,
    total,
)
from torch import Tensor
from torch.autograd import forward_ad

import fastpref
from fastpref import Responses
from fastpref.losses import METHODS

# torch.func.jvp and make_dual script what PyTorch no longer wants scripted.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
TRANSFORMS = [
    *(torch.func.grad, torch.func.vjp, torch.func.jacrev),
    *(torch.func.jacfwd, torch.func.hessian, torch.func.linearize, torch.func.jvp),
]
REFUSED = r"^fastpref\.\w+: torch\.func .* not supported: call it outside of them"


def transformed(transform: Any, function: Any, point: Tensor) -> object:
    if transform is torch.func.jvp:
        return transform(function, (point,), (torch.ones_like(point),))
    if transform in (torch.func.vjp, torch.func.linearize):
        return transform(function, point)
    return transform(function)(point)


@pytest.mark.parametrize("name", HEADED)
def test_transforms_are_refused(name):
    given = batch()
    leaf = "states" if name == "teacher_shaping" else "weight"

    def of(changed: Tensor) -> Tensor:
        return sum(one.double().sum() for one in flat(HEADED[name]({**given, leaf: changed}, True)))

    for transform in TRANSFORMS:
        with pytest.raises(NotImplementedError, match=REFUSED):
            transformed(transform, of, given[leaf])
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.vmap(of)(torch.stack([given[leaf]] * 2))


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("leaf", ["hidden", "bias", "teacher", "means"])
def test_tangents_are_refused_wherever_they_come_in(name, leaf):
    """Unnoticed they would count as zero, and the answer would be wrong."""
    given = batch()
    with forward_ad.dual_level():
        given[leaf] = forward_ad.make_dual(given[leaf], torch.ones_like(given[leaf]))
        try:
            found = flat(HEADED[name](given, True))
        except NotImplementedError as error:
            assert str(error).startswith("fastpref.")
            return
        # It does not read what has the tangent.
        given[leaf] = torch.full_like(batch()[leaf], torch.nan)
        assert same_bits(found, flat(HEADED[name](given, True)))


def test_a_refusal_names_the_function_and_says_what_to_do():
    given = batch()
    with pytest.raises(NotImplementedError) as caught:
        torch.func.grad(lambda x: fastpref.linear_logsumexp(x, given["weight"]).sum())(
            given["hidden"]
        )
    for words in ("fastpref.linear_logsumexp: ", "torch.autograd.grad", "leading dimensions"):
        assert words in str(caught.value)


@pytest.mark.parametrize(("name", "trained"), WITH_GRADIENT)
def test_second_derivatives_are_refused(name, trained):
    given = batch(trains=leaves_of(trained))
    loss = total(HEADED[name](given, True))
    first = gradients(given, loss, retain_graph=True)
    again = gradients(given, loss, create_graph=True)
    assert same_bits(first, [one.detach() for one in again])
    for one in again:
        with pytest.raises(NotImplementedError, match=r"^fastpref\.\w.*: second derivatives are"):
            one.sum().backward(retain_graph=True)


@pytest.mark.parametrize(("name", "trained"), WITH_GRADIENT)
def test_gradients_of_many_losses_at_once_are_those_of_each(name, trained):
    """`is_grads_batched` maps the backward pass alone, which is how jacobians are vectorised."""
    given = batch(trains=leaves_of(trained))
    found = next(one for one in flat(HEADED[name](given, True)) if one.requires_grad)
    wanted = [given[leaf] for leaf in leaves_of(trained)]
    incoming = torch.randn(3, *found.shape)
    at_once = torch.autograd.grad(
        found, wanted, incoming, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    for index, one in enumerate(incoming):
        alone = torch.autograd.grad(found, wanted, one, retain_graph=True, allow_unused=True)
        for several, expected in zip(at_once, alone, strict=True):
            assert (several is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(several[index], expected)


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_sums_are_plain_pytorch(method):
    """Any transform differentiates them, and second derivatives are right."""
    (logps, lengths), given = loss_batch(method, torch.float64)

    def loss(logps: Tensor) -> Tensor:
        return METHODS[method](Responses(logps, lengths), **given).loss

    direction = torch.randn_like(logps)
    x = logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True, materialize_grads=True)
    torch.testing.assert_close(torch.func.grad(loss)(logps), gradient.detach())
    _, curved = torch.func.jvp(torch.func.grad(loss), (logps,), (direction,))
    if gradient.requires_grad:
        (expected,) = torch.autograd.grad(gradient @ direction, x, materialize_grads=True)
        torch.testing.assert_close(curved, expected)
        each = torch.func.vmap(loss)(torch.stack((logps, 2 * logps)))
        torch.testing.assert_close(each, torch.stack((loss(logps), loss(2 * logps))))
