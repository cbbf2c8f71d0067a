"""Mutants reach the functions that tests call, or are said to need a fresh import."""

from __future__ import annotations

import importlib
import sys

import pytest
from patching import functions_of, patch, patchable, replacements

CODE = """
import functools

def made_anew(function):
    @functools.wraps(function)
    def call(x):
        return function(x) + 10
    return call

def double(x, times=2):
    return [x * one for one in [times]][0]

@made_anew
def triple(x):
    return 3 * x
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "to_be_patched.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    functions = functions_of(["to_be_patched"])
    yield sys.modules["to_be_patched"], functions
    del sys.modules["to_be_patched"]
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ("x * one", "x - one", (3, 25)),
        ("3 * x", "4 * x", (10, 30)),
        ("+ 10", "- 10", (10, 5)),
    ],
)
def test_functions_are_changed_where_others_hold_them(module, was, now, expected):
    found, functions = module
    double, triple = found.double, found.triple
    assert (double(5), triple(5)) == (10, 25)
    changed = replacements(CODE, CODE.replace(was, now), found.__file__)
    assert patchable(changed, functions)
    patch(changed, functions)
    assert (double(5), triple(5)) == expected


@pytest.mark.parametrize(("was", "now"), [("times=2", "times=3"), ("@made_anew", "")])
def test_what_importing_does_needs_another_import(module, was, now):
    assert replacements(CODE, CODE.replace(was, now), module[0].__file__) is None


def test_a_function_that_importing_calls_is_not_patchable(module):
    found, functions = module
    changed = replacements(CODE, CODE.replace("return call", "return function"), found.__file__)
    assert not patchable(changed, functions)


def test_a_comment_changes_nothing(module):
    assert replacements(CODE, CODE + "# x", module[0].__file__) == {}
