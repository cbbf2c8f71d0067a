"""The examples in the docstrings of the public functions run and say what they print."""

from __future__ import annotations

import doctest

import pytest
import torch

import fastpref

FUNCTIONS = [name for name in fastpref.__all__ if not isinstance(getattr(fastpref, name), type)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name):
    names = {"torch": torch, **{public: getattr(fastpref, public) for public in fastpref.__all__}}
    (found,) = doctest.DocTestFinder().find(getattr(fastpref, name), name, globs=names)
    assert found.examples, f"{name} has no example"
    results = doctest.DocTestRunner().run(found)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples failed"
