"""The examples in the docstrings of the public functions run and say what they print."""

from __future__ import annotations

import doctest

import pytest
import torch

import fastpref
import fastpref.data
import fastpref.inspection
import fastpref.models
import fastpref.teacher

FUNCTIONS = {
    name: getattr(module, name)
    for module, names in (
        (fastpref, fastpref.__all__),
        (fastpref.losses, fastpref.losses.METHODS),
        (fastpref.models, fastpref.models.__all__),
        (fastpref.data, fastpref.data.__all__),
        (fastpref.inspection, fastpref.inspection.__all__),
        (fastpref.teacher, fastpref.teacher.__all__),
    )
    for name in names
    if callable(getattr(module, name))
}
# Classes whose docstrings have an example; the others are results, explained field by field.
EXAMPLES = [name for name, one in FUNCTIONS.items() if not isinstance(one, type) or name == "Head"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    names = {"torch": torch, "fastpref": fastpref, **FUNCTIONS}
    (found,) = doctest.DocTestFinder(recurse=False).find(FUNCTIONS[name], name, globs=names)
    assert found.examples, f"{name} has no example"
    results = doctest.DocTestRunner().run(found)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples failed"
