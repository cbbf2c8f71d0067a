"""What `make docs` adds to Sphinx. It needs the extra ``docs``."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
from pages import ROOT

from fastpref import cli


def extension(name):
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/_site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("formula", "spaced"),
    [
        (r"\log \sigma(x)", r"\log\,\sigma(x)"),
        (r"\log(x)", r"\log(x)"),
        (r"a \log p", r"a\,\log\,p"),
        (r"-\log p", r"-\log\,p"),
        (r"\text{mean} \log \pi", r"\text{mean}\,\log\,\pi"),
        (r"\mathrm{softcap}(x) \logit", r"\mathrm{softcap}(x) \logit"),
    ],
)
def test_spaces_around_functions(formula, spaced):
    assert extension("mathml")._spaced(formula) == spaced


def test_a_page_that_needs_a_network_is_found(tmp_path):
    page = '<a href="https://a.org">a</a><script defer src="{}//b.org/b.js"></script>'
    loaded = extension("offline").loaded
    (tmp_path / "index.html").write_text(page.format("https:"), "utf-8")
    assert loaded(tmp_path) == ["https://b.org/b.js"]
    (tmp_path / "index.html").write_text(page.format("").replace("//b", "b"), "utf-8")
    assert loaded(tmp_path) == []


def test_options_are_described():
    pytest.importorskip("trl")
    options = extension("command_options")
    text = "With --values only: torchrun -m fastpref values ... Two-sided - a--b."
    assert options._marked(text) == (
        "With ``--values`` only: ``torchrun -m fastpref values ...`` Two-sided - a--b."
    )
    found = inspect.signature(cli.values, eval_str=True).parameters
    usage, text = options._described(found["potential"])
    assert usage == "--potential <value|max|margin|expectation|implicit_reward>"
    assert text.endswith("Default: ``value``.")
    assert options._described(found["teacher"])[1].endswith("**Required.**")
    assert options._described(found["per_token"])[0] == "--per-token"
    assert options._described(found["max_length"])[0] == "--max-length <integer>"
