"""Gives functions that are imported already the code of a mutant."""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
import types
from collections.abc import Iterator

Changed = dict[types.CodeType, types.CodeType]  # new code by old
Place = tuple[str, str, int]
Functions = dict[Place, list[types.FunctionType]]
OF_FUNCTIONS = inspect.CO_OPTIMIZED | inspect.CO_NEWLOCALS


def replacements(before: str, after: str, path: str) -> Changed | None:
    """New code by old, of functions that differ; None if the module must be imported anew."""
    old = list(_codes(compile(before, path, "exec")))
    new = list(_codes(compile(after, path, "exec")))
    if [one.co_qualname for one in old] != [one.co_qualname for one in new]:
        return None
    changed = {one: other for one, other in zip(old, new, strict=True) if _differ(one, other)}
    for one, other in changed.items():
        if one.co_flags & OF_FUNCTIONS != OF_FUNCTIONS or one.co_freevars != other.co_freevars:
            return None
    # Whoever makes a function anew, as decorators and losses do, must make the new one.
    outer = {
        one: other
        for one, other in zip(old, new, strict=True)
        if one.co_flags & OF_FUNCTIONS == OF_FUNCTIONS
        and any(inner in changed for inner in _codes(one))
    }
    return outer


def functions_of(modules: list[str]) -> Functions:
    """All functions of modules, imported here, but for those that importing them calls.

    A decorator, for example, has done its work when another code comes.
    """
    called: set[types.CodeType] = set()

    def note(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call":
            called.add(frame.f_code)

    sys.setprofile(note)
    for name in modules:
        importlib.import_module(name)
    sys.setprofile(None)
    found: Functions = {}
    for one in gc.get_objects():
        if type(one) is types.FunctionType and one.__code__ not in called:
            found.setdefault(_place(one.__code__), []).append(one)
    return found


def patchable(changed: Changed, functions: Functions) -> bool:
    """Whether any function there is has one of these codes."""
    return any(_place(old) in functions for old in changed)


def patch(changed: Changed, functions: Functions) -> None:
    """Give all functions that have one of these codes the other one."""
    for old, new in changed.items():
        for function in functions.get(_place(old), ()):
            function.__code__ = new


def _place(code: types.CodeType) -> Place:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _differ(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether two codes differ, but for the codes within them and where their parts stand."""

    def about(code: types.CodeType) -> tuple[object, ...]:
        inner = [
            None if isinstance(constant, types.CodeType) else (type(constant), repr(constant))
            for constant in code.co_consts
        ]
        return code.co_code, inner, code.co_names, code.co_varnames, code.co_freevars

    return about(one) != about(other)
