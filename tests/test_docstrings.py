"""The examples in the docstrings of the public functions run and say what they print."""

from __future__ import annotations

import doctest

import pytest
import torch

import fastpref.parallel
import fastpref.teacher
from fastpref.integrations import fused_head, reward_head
from fastpref.integrations import transformers as heads

FUNCTIONS = {
    name: getattr(module, name)
    for module, names in (
        (fastpref, fastpref.__all__),
        (fastpref.teacher, fastpref.teacher.__all__),
        (fastpref.parallel, fastpref.parallel.__all__),
        (heads, ["lm_head_of"]),
        (fused_head, ["add_fused_head"]),
        (reward_head, ["add_reward_head", "load_reward_head"]),
    )
    for name in names
    if not isinstance(getattr(module, name), type)
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name):
    names = {"torch": torch, **FUNCTIONS}
    (found,) = doctest.DocTestFinder().find(FUNCTIONS[name], name, globs=names)
    assert found.examples, f"{name} has no example"
    results = doctest.DocTestRunner().run(found)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples failed"
