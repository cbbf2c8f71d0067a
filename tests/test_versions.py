"""docs/versions.md, pyproject.toml, the trainers' own check and `make test-matrix` say the same."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from pages import commands

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/versions.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SPEC = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
assert SPEC is not None and SPEC.loader is not None
matrix = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(matrix)


def required(name: str, extra: str | None = None) -> Requirement:
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] if extra is None else extras[extra]
    (found,) = (one for one in map(Requirement, lines) if one.name == name)
    return found


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first line is `head`."""
    _, _, below = PAGE.partition(f"| {head} |")
    lines = below.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_the_bounds_of_the_package():
    supported = {package: cell for package, cell, _ in rows("package | supported | needed by")}
    lowest = {
        "Python": PROJECT["requires-python"],
        "PyTorch": str(required("torch").specifier),
        "Triton": str(required("triton", "triton").specifier),
    }
    for package, specifier in lowest.items():
        assert supported[package] == f"{specifier.removeprefix('>=')} or later"
    first, last = re.findall(r"1\.(\d+)", supported["TRL"])
    trl = required("trl", "trl").specifier
    assert str(trl) == f"<1.{int(last) + 1},>=1.{first}"
    assert str(required("trl", "teacher").specifier) == f">=1.{first}"
    (tried,) = re.findall(r"up to ([\d.]+) tried", supported["transformers"])
    assert version("transformers").startswith(f"{tried}."), "the page names the newest tried"


def test_the_page_has_the_combinations_that_are_run():
    names = {"PyTorch": "torch", "Triton": "triton", "TRL": "trl", "NumPy": "numpy"}
    shown = {}
    for name, *cells in rows("name | PyTorch | Triton | TRL | NumPy"):
        pins = zip(names.values(), cells, strict=True)
        shown[name.strip("`")] = {f"{one}=={cell}" for one, cell in pins if cell[0].isdigit()}
    assert list(shown) == list(matrix.COMBINATIONS)
    shown.pop("newest")
    for name, pins in shown.items():
        assert pins == set(matrix.COMBINATIONS[name])


def test_the_commands():
    """They would take hours: their words name a target, combinations and tests that there are."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for make, target, *words in commands("docs/versions.md"):
        assert make == "make" and f"\n{target}: " in makefile
        given = dict(word.split("=") for word in words)
        assert given.keys() <= {"MATRIX", "TESTS"}
        assert set(given.get("MATRIX", "").split()) <= matrix.COMBINATIONS.keys()
        assert all((ROOT / one).exists() for one in given.get("TESTS", "").split())


def test_the_lowest_versions_are_among_those_that_are_run():
    pinned: dict[str, list[Version]] = {"torch": [], "triton": [], "trl": []}
    for requirement in map(Requirement, sum(matrix.COMBINATIONS.values(), ())):
        for one in requirement.specifier:
            if one.operator == "==" and requirement.name in pinned:
                pinned[requirement.name].append(Version(one.version))
    bounds = {
        "torch": required("torch"),
        "triton": required("triton", "triton"),
        "trl": required("trl", "trl"),
    }
    for name, requirement in bounds.items():
        (lowest,) = (one.version for one in requirement.specifier if one.operator == ">=")
        assert Version(lowest).release == min(pinned[name]).release[:2]
    newest = {one.name: one for one in map(Requirement, matrix.COMBINATIONS["newest"])}
    for name, requirement in bounds.items():
        assert newest[name].specifier == requirement.specifier


def test_the_trainers_refuse_what_the_package_excludes():
    pytest.importorskip("trl")
    source = (ROOT / "fastpref/integrations/trl/__init__.py").read_text("utf-8")
    (listed,) = re.findall(r"not in \((.*?)\):", source)
    accepted = [f"{one}.{two}" for one, two in re.findall(r'\["(\d+)", "(\d+)"\]', listed)]
    bounds = required("trl", "trl").specifier
    possible = [f"1.{minor}" for minor in range(100)] + ["2.0"]
    assert accepted == [one for one in possible if bounds.contains(one)]


@pytest.mark.parametrize(
    ("last", "found"),
    [
        ("= 2 failed, 5 passed, 1 skipped, 3 deselected in 4.0s =", (5, 2, 1)),
        ("7 passed in 245.42s (0:04:05)", (7, 0, 0)),
        ("18 errors in 10.55s", (0, 18, 0)),
        ("1 passed, 1 error in 1s", (1, 1, 0)),
        ("no tests ran in 0.01s", (0, 0, 0)),
        ("Fatal Python error: Segmentation fault", (0, 0, 0)),
    ],
)
def test_counts_of_a_report(last, found):
    assert (
        tuple(matrix.counts(f"...F [100%]\n4 failed in all\n{last}\nafter the end\n").values())
        == found
    )


@pytest.mark.parametrize(
    ("tests", "found"),
    [
        (["tests"], ["tests/kernels", "tests/losses/test_tvkd.py", "-k", "not slow"]),
        (["tests/kernels/test_pairs.py"], ["tests/kernels/test_pairs.py", "-k", "not slow"]),
        (["tests/losses"], ["tests/losses/test_tvkd.py", "-k", "not slow"]),
        (["tests/trainers"], []),
    ],
)
def test_the_interpreted_run_is_narrowed(tests, found):
    interpreted = ["tests/kernels", "tests/losses/test_tvkd.py", "-k", "not slow"]
    assert matrix.within(interpreted, tests) == found
