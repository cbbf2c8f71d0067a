"""Refusals of bad input: a ``ValueError`` names the argument, what was expected and what came."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """Raise the ``ValueError`` that every check raises."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """Refuse a hyper-parameter that is not a finite number within its bounds; give it as a float.

    Tensors are refused: the host would have to wait for their device.
    """
    bounds = [
        f"{word} {bound}"
        for word, bound in (("above", above), ("at least", at_least), ("at most", at_most))
        if bound is not None
    ]
    expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
    if isinstance(value, Tensor):
        refuse(name, f"{expected} (use .item())", repr(value))
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(name, expected, repr(value))
    value = float(value)
    if not -math.inf < value < math.inf:  # torch.compile does not trace math.isfinite
        refuse(name, expected, repr(value))
    if (
        (above is not None and value <= above)
        or (at_least is not None and value < at_least)
        or (at_most is not None and value > at_most)
    ):
        refuse(name, expected, value)
    return value


class Bounds(NamedTuple):
    """Which finite numbers an option may be: the annotation says it, `check_options` holds it."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None


Finite = Annotated[float, Bounds()]
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(at_least=0)]
Smoothing = Annotated[float, Bounds(at_least=0, at_most=0.5)]


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a loss's options, by name: numbers with `Bounds`, flags and choices."""
    hints = get_type_hints(function, include_extras=True)
    return {
        name: hints[name]
        for name in inspect.signature(function).parameters
        if hints[name] is bool
        or get_origin(hints[name]) is Literal
        or any(isinstance(one, Bounds) for one in get_args(hints[name]))
    }


def check_options(loss: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse what the annotations of a loss's options do not allow."""
    check_annotated(options_of(loss), options)


def check_annotated(annotations: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Hold ``values`` to the annotations that `options_of` gives; numbers become floats."""
    checked = dict(values)
    for name, annotation in annotations.items():
        if name not in values:
            continue
        if annotation is bool:
            check_flag(name, values[name])
        elif get_origin(annotation) is Literal:
            check_choice(name, values[name], get_args(annotation))
        else:
            checked[name] = check_number(name, values[name], **get_args(annotation)[1]._asdict())
    return checked


def is_finite_float32(value: object) -> bool:
    """Whether a value of a dataset is a number that float32 can hold."""
    return isinstance(value, Real) and abs(float(value)) <= torch.finfo(torch.float32).max


def check_scratch_bytes(value: int | None) -> None:
    """Refuse what is no number of bytes, nor None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        refuse("scratch_bytes", "a whole number of bytes, at least 0, or None", repr(value))


def check_flag(name: str, value: bool) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        refuse(name, "True or False", repr(value))


def check_ignore_index(value: int) -> None:
    """Refuse an ``ignore_index`` that is not an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        refuse("ignore_index", "an integer", repr(value))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a string that is not one of ``choices``."""
    if value not in choices:
        refuse(name, " or ".join(repr(choice) for choice in choices), repr(value))


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse a tensor of another shape than ``shape``, which ``meaning`` puts in words."""
    if not isinstance(tensor, Tensor):
        refuse(name, f"a tensor of shape {meaning}", type(tensor).__name__)
    if tuple(tensor.shape) != tuple(shape):
        refuse(name, f"shape {tuple(shape)} ({meaning})", tuple(tensor.shape))


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor on another device than ``other``."""
    if tensor.device != other.device:
        refuse(name, f"device {other.device}, like {other_name}", tensor.device)


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse what is not a tensor of floating-point numbers."""
    if not isinstance(tensor, Tensor):
        refuse(name, "a tensor", type(tensor).__name__)
    if tensor.dtype not in FLOATS:
        refuse(name, "float64, float32, float16 or bfloat16", tensor.dtype)


def check_beside(name: str, hidden: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse hidden states that are not of the same positions as ``other``, on its device."""
    check_floating(name, hidden)
    check_device(name, hidden, other_name, other)
    if hidden.shape[:-1] != other.shape[:-1]:
        shape = ", ".join(map(str, (*other.shape[:-1], "H")))
        expected = f"shape ({shape}), like {other_name} but for the last dimension"
        refuse(name, expected, tuple(hidden.shape))


def check_reference(takes: bool, choice: str, hidden: object, head: object) -> None:
    """Refuse a reference that is missing, or that what was chosen, for example a kind, has not."""
    for name, given in (("reference_hidden", hidden), ("reference_head", head)):
        if takes and given is None:
            refuse(name, f"that of the reference, with {choice}", None)
        if not takes and given is not None:
            refuse(name, f"None with {choice}", type(given).__name__)


def check_flags(name: str, tensor: Tensor) -> None:
    """Refuse what is not a tensor of flags."""
    if not isinstance(tensor, Tensor):
        refuse(name, "a tensor", type(tensor).__name__)
    if tensor.dtype != torch.bool:
        refuse(name, "bool", tensor.dtype)


def check_integers(name: str, tensor: Tensor) -> None:
    """Refuse what is not a tensor of integers."""
    if not isinstance(tensor, Tensor):
        refuse(name, "a tensor", type(tensor).__name__)
    if tensor.dtype not in INTEGERS:
        refuse(name, "an integer dtype such as int64", tensor.dtype)


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    """Refuse labels that are not integers on the device of the hidden states."""
    check_floating("hidden", hidden)
    check_integers("labels", labels)
    check_device("labels", labels, "hidden", hidden)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """Refuse hidden states (..., H) and a head (V, H), (V,) that do not fit together.

    The arguments are called by their names after ``prefix``.
    """
    if hidden.dim() < 1:
        refuse(f"{prefix}hidden", "shape (..., H)", tuple(hidden.shape))
    if weight.dim() != 2 or 0 in weight.shape:
        refuse(f"{prefix}weight", "shape (V, H), neither of them zero", tuple(weight.shape))
    if weight.shape[1] != hidden.shape[-1]:
        refuse(
            f"{prefix}weight",
            f"shape (V, {hidden.shape[-1]}), the last dimension of {prefix}hidden",
            tuple(weight.shape),
        )
    same_as_hidden = [(f"{prefix}weight", weight)]
    if bias is not None:
        check_shape(f"{prefix}bias", bias, (weight.shape[0],), "(V,)")
        same_as_hidden.append((f"{prefix}bias", bias))
    for name, tensor in same_as_hidden:
        check_device(name, tensor, f"{prefix}hidden", hidden)
        if tensor.dtype != hidden.dtype:
            refuse(name, f"dtype {hidden.dtype}, like {prefix}hidden", tensor.dtype)
