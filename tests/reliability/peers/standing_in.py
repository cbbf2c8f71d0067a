"""How fastpref's functions take the place of a peer's, and how it is known that they ran."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import pytest

calls: list[str] = []  # of stand-ins since the test began

Function = Callable[..., Any]
Places = Mapping[str, Any]  # "module:name" or "module:Class.name" to what stands in


def stand_in(function: Function) -> Function:
    """A function that leaves a note of each call: a test without one says nothing about us."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments, **named)

    return call


def not_applicable(reason: str) -> NoReturn:
    """Leave the running test: it asks for what fastpref does not have."""
    pytest.skip(reason)


def install(places: Places) -> list[str]:
    """Put stand-ins in their places; return the places that this version of the peer has not."""
    missing = []
    for place, replacement in places.items():
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for one in owners:
                owner = getattr(owner, one)
            getattr(owner, name)
        except (AttributeError, ModuleNotFoundError):
            missing.append(place)
            continue
        # A class would make a method of a function, which a peer's static method is not.
        setattr(owner, name, staticmethod(replacement) if owners else replacement)
    return missing
