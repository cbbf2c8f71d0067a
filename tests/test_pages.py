"""Every block of code on a page is executed by a test, and the reference has every public name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tomllib

import pytest
from pages import ROOT, all_blocks, blocks, commands, pages

import fastpref

PARSED = "tests/test_pages.py::test_shell_lines"  # parsed, each with the reason beside it
START = "tests/trainers/test_start_page.py::test_the_page"
DISTRIBUTED = "tests/distributed/test_distributed.py::test_ddp_fsdp2_and_tensor_parallel"
VALUES = "tests/teacher/test_docs.py"
TRAINERS = "tests/trainers/test_trainers_page.py"
TRAIN = "tests/trainers/test_train_command.py"
HUB = "tests/test_hub_kernels.py::test_the"
INSPECT = "tests/inspection/test_inspect_command.py::test_the_page_in_docs"
RECIPES = "tests/recipes"
REFERENCE = "test_dpo_with_these_columns_is_tvkd"
# The blocks of each page in their order: the language, and the test that executes the block.
CLAIMS = {
    "README.md": [
        ("sh", PARSED),  # installs: `make check-install` does the same to a wheel
        ("python", "tests/test_readme.py::test_the_loop_trains"),
        ("diff", "tests/test_readme.py::test_the_changed_line"),
        ("bibtex", None),
    ],
    "docs/start.md": [
        ("sh", PARSED),  # installs
        ("python", START),
        ("python", START),
        ("sh", PARSED),  # installs, and runs scripts that take minutes
        ("python", START),
        ("python", START),
        *[("sh", START)] * 4,
    ],
    "docs/losses.md": [("python", "tests/test_pages.py::test_losses")] * 2,
    "docs/how_it_works.md": [
        ("python", "tests/test_readme.py::test_the_three_layers_are_the_call")
    ],
    "docs/values.md": [
        ("sh", f"{VALUES}::test_the_commands"),
        ("python", f"{VALUES}::test_python"),
        ("python", f"{VALUES}::test_python"),
        ("sh", f"{VALUES}::test_the_commands"),
    ],
    "docs/kd_cache.md": [
        ("sh", f"{VALUES}::test_distributions"),
        ("python", f"{VALUES}::test_distributions"),
        ("python", f"{VALUES}::test_distributions"),
    ],
    "docs/inspect.md": [("sh", INSPECT), ("sh", INSPECT), ("python", INSPECT)],
    "docs/trainers.md": [
        ("sh", PARSED),  # installs
        ("python", f"{TRAINERS}::test_trl"),
        ("yaml", f"{TRAIN}::test_the_page"),
        ("sh", f"{TRAIN}::test_the_page"),
        ("python", f"{TRAINERS}::test_trl"),
        ("sh", f"{TRAINERS}::test_trl"),
        *[("python", f"{TRAINERS}::test_trl")] * 4,
        ("python", f"{TRAINERS}::test_a_method_of_ones_own"),
        ("python", f"{TRAINERS}::test_the_plain_trainer"),
    ],
    "docs/distributed.md": [("python", DISTRIBUTED)] * 4,
    "docs/recipes.md": [
        ("sh", f"{RECIPES}/test_accelerate.py::test_the_commands_of_the_page"),
        ("sh", "tests/trainers/test_processes.py::test_two_processes_train_as_one"),
        *[("python", f"{RECIPES}/test_packed.py::test_packed_is_padded")] * 2,
        *[("python", f"{RECIPES}/test_reference_columns.py::{REFERENCE}")] * 2,
        ("sh", PARSED),  # servers, which need GPUs
        *[("python", f"{RECIPES}/test_vllm.py::test_columns_of_servers")] * 3,
        *[("python", f"{RECIPES}/test_lightning.py::test_fit")] * 2,  # by `make recipes`
        ("yaml", f"{RECIPES}/test_torchtune.py::test_the_recipe_trains"),  # by `make recipes`
        # by `make recipes`
        ("yaml", f"{RECIPES}/test_axolotl.py::test_the_plug_in_brings_alpha_to_the_arguments"),
    ],
    "docs/hub_kernels.md": [("sh", f"{HUB}_commands_of_the_page"), ("python", f"{HUB}_page")],
    "docs/versions.md": [("sh", "tests/test_versions.py::test_the_commands")],
    "docs/evidence.md": [("sh", PARSED)],  # hours
    "examples/README.md": [
        ("sh", PARSED),  # installs
        ("sh", PARSED),  # GPUs and the Hub; tests/examples runs the scripts on tiny models
    ],
    "benchmarks/README.md": [("sh", PARSED)] * 6,  # minutes each, or GPUs
    "benchmarks/NOTES.md": [("sh", PARSED)],  # minutes
    "benchmarks/gold/README.md": [("sh", PARSED)],  # hours
}


def test_every_block_is_claimed_by_a_test():
    found = {page: [language for language, _ in all_blocks(page)] for page in pages()}
    claimed = {page: [language for language, _ in of] for page, of in CLAIMS.items()}
    assert {page: of for page, of in found.items() if of} == claimed


@pytest.mark.parametrize("page", CLAIMS)
def test_the_tests_are_there_and_read_the_page(page):
    for test in {test for _, test in CLAIMS[page] if test}:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}, test
        texts = {one.value for one in ast.walk(tree) if isinstance(one, ast.Constant)}
        assert page in texts, f"{test} does not read {page}"


def test_losses():
    torch = pytest.importorskip("torch")
    names = {
        "fastpref": fastpref,
        "student_hidden": torch.randn(2, 5, 8),
        "student_head": torch.randn(30, 8),
        "teacher_hidden": torch.randn(2, 5, 6),
        "teacher_head": torch.randn(30, 6),
        "labels": torch.randint(30, (2, 5)),
    }
    logits = names["teacher_hidden"] @ names["teacher_head"].T
    top = logits.log_softmax(-1).topk(30)
    names |= {"token_ids": top.indices, "token_logps": top.values}
    divergence, cached = blocks("docs/losses.md")
    exec(divergence, names)
    exact = names["per_token"]
    assert names["divergences"].tolist() == pytest.approx(exact.sum(1).tolist())
    first, _, last = cached.partition("per_token = fastpref.linear_topk")
    exec(first, names)
    torch.testing.assert_close(names["per_token"], exact, rtol=1e-4, atol=1e-5)
    exec(f"per_token = fastpref.linear_topk{last}", names)  # of all tokens there are
    torch.testing.assert_close(names["per_token"], exact, rtol=1e-4, atol=1e-5)


SCRIPT_RUNNERS = ("python", "accelerate")
INSTALLED = ("pip", "fastpref", "export", "make", "torchrun", "vllm")


@pytest.mark.parametrize("page", CLAIMS)
def test_shell_lines(page):
    """Scripts, files and options that shell blocks name are there; tests run what is quick."""
    for words in commands(page):
        assert words[0] in (*SCRIPT_RUNNERS, *INSTALLED), words
        if "pip" in words:
            check_install(words)
        elif words[0] in SCRIPT_RUNNERS:
            check_script(words)


def check_install(words):
    """An extra that there is, a package that the Makefile has in that version, or a file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras, makefile = project["optional-dependencies"], (ROOT / "Makefile").read_text("utf-8")
    for word in words[words.index("install" if "install" in words else "download") + 1 :]:
        assert not word.startswith("fastpref"), "no such distribution exists"
        if found := re.fullmatch(r"\.\[(.+)\]", word):
            assert set(found[1].split(",")) <= extras.keys(), word
        elif "==" in word:
            assert word in makefile
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file()


def check_script(words):
    """The script is a file, and each of its options an argument or a field in it."""
    script = next(word for word in words if word.endswith(".py"))
    text = (ROOT / script).read_text("utf-8")
    for word in words[words.index(script) + 1 :]:
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word
        elif word.startswith("--") and word not in ("--help", "--config"):  # these all have
            name = word.removeprefix("--")
            assert re.search(rf'"--{name}"|^    {name}: ', text, flags=re.M), f"{script} {word}"


ROOMS = {  # public modules, and the page of each
    "fastpref": "functions",
    "fastpref.losses": "losses",
    "fastpref.models": "models",
    "fastpref.teacher": "teacher",
    "fastpref.data": "data",
    "fastpref.inspection": "inspection",
    "fastpref.integrations.trl": "trl",
}


def public():
    """Every public object, by the module that a reader imports it from."""
    found = {}
    for room in ROOMS:
        module = importlib.import_module(room)
        names = getattr(module, "__all__", None) or module.METHODS
        found |= {(room, name): getattr(module, name) for name in names}
    return {place: one for place, one in found.items() if not inspect.ismodule(one)}


def documented():
    """What the directives of the reference name, by object."""
    found = []
    for room, page in ROOMS.items():
        text = (ROOT / f"docs/reference/{page}.rst").read_text("utf-8")
        assert f".. module:: {room}\n" in text
        for name in re.findall(r"^\.\. auto(?:function|class):: ([\w.:]+)", text, flags=re.M):
            module, _, name = name.rpartition("::")
            found.append(getattr(importlib.import_module(module or room), name))
    return found


def results(one):
    """The named tuple that a function returns, if it does."""
    if not inspect.isfunction(one):
        return set()
    name = str(inspect.signature(one).return_annotation)
    kind = getattr(sys.modules[one.__module__], name, None)
    return {kind} if hasattr(kind, "_fields") else set()


def test_the_reference_has_every_public_name_once_and_what_they_return():
    pytest.importorskip("trl")
    found = documented()
    assert len(found) == len(set(found)), "twice"
    expected = set(public().values())
    expected |= {one for function in expected for one in results(function)}
    fields = importlib.import_module("fastpref.inspection.measures")
    expected |= {fields.SignalMeasures, fields.Share}  # an Inspection's numbers
    assert set(found) == expected


def test_the_reference_has_every_command():
    pytest.importorskip("typer")
    app = importlib.import_module("fastpref.cli").app
    names = {one.callback.__name__.replace("_", "-") for one in app.registered_commands}
    text = (ROOT / "docs/reference/commands.rst").read_text("utf-8")
    assert set(re.findall(r"^\.\. command-options:: (\S+)$", text, flags=re.M)) == names


def test_every_page_is_in_a_menu():
    """As `make docs` asks, without a build."""
    menu = (ROOT / "docs/index.rst").read_text("utf-8")
    for page in sorted((ROOT / "docs").rglob("*.*")):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        if page.suffix in (".md", ".rst") and name not in ("README", "index"):
            assert re.search(rf"^   (?:.* <)?{name}>?$", menu, flags=re.M), name
