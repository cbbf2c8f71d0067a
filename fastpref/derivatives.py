"""Which derivatives there are: first ones, backward. All others are refused here, in our words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual
from torch.func import debug_unwrap

Parameters = ParamSpec("Parameters")
Output = TypeVar("Output")
Gradients = tuple[Tensor | None, ...]


def plain_autograd_only(function: Callable[Parameters, Output]) -> Callable[Parameters, Output]:
    """Make a function refuse arguments that are inside a transform, whichever they are."""

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Output:
        if not torch.compiler.is_compiling():
            refuse_transforms(f"fastpref.{function.__name__}", (*arguments, *named.values()))
        return function(*arguments, **named)

    return call


def refuse_transforms(name: str, arguments: Iterable[object]) -> None:
    """Refuse tensors that ``torch.func`` or forward-mode differentiation follows.

    A custom operator would take a tangent silently for zero, and answers the others with an error
    about its insides or with a slow loop.
    """
    for one in arguments:
        if isinstance(one, tuple):  # a `Head`, for instance
            refuse_transforms(name, one)
        elif isinstance(one, Tensor) and _is_followed(one):
            raise NotImplementedError(
                f"{name}: torch.func (grad, vmap, jvp, jacrev, ...) and forward-mode derivatives "
                "are not supported: call it outside of them, with torch.autograd.grad or "
                "backward() for gradients and leading dimensions in place of vmap"
            )


def _is_followed(tensor: Tensor) -> bool:
    dual = unpack_dual(tensor)  # type: ignore[no-untyped-call]  # torch's own
    return dual.tangent is not None or debug_unwrap(tensor) is not tensor


def first_derivative_only(
    name: str,
) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Make a backward function one whose gradients refuse, under ``name``, to be differentiated.

    What autograd would make of a second derivative is wrong or missing: saved numbers, a Jacobian
    for example, depend on the inputs and would count as constants. These inputs are to be saved,
    too: it is they who lead from a second derivative to the refusal.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def call(ctx: Any, *incoming: Tensor | None) -> Gradients:
            with torch.no_grad():
                found = backward(ctx, *incoming)
            if not torch.is_grad_enabled():
                return found
            given = (*incoming, *ctx.saved_tensors)
            sources = [one for one in given if one is not None and one.requires_grad]
            return tuple(one if one is None else _refusing(name, one, sources) for one in found)

        return call

    return decorate


def _refusing(name: str, gradient: Tensor, sources: list[Tensor]) -> Tensor:
    refusing: Tensor = _Refusing.apply(name, gradient, *sources)  # type: ignore[no-untyped-call]  # autograd's own
    return refusing


class _Refusing(Function):
    """A gradient that depends on its sources in a way that is not known."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *_: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            f"{ctx.name}: second derivatives are not supported (backward through a gradient made "
            "with create_graph=True, hessians, gradient penalties): compute what needs them from "
            "logits, torch.nn.functional.linear(hidden, weight, bias)"
        )
