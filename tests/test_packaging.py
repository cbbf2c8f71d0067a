"""How the package is put together."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastpref
from fastpref.extras import require_extra

ROOT = Path(fastpref.__file__).resolve().parents[1]


def test_kernels_never_shadow_the_hubs_package(tmp_path):
    """`import kernels` at the repository root must not find ours: transformers wants the Hub's."""
    hubs = tmp_path / "kernels" / "__init__.py"
    hubs.parent.mkdir()
    hubs.touch()
    # "-c" puts the repository root first on the path, before where the Hub's is installed.
    found = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.__file__)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(hubs)


def test_kernels_are_found_inside_the_package():
    spec = importlib.util.find_spec("fastpref.kernels.tiles")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / "kernels" / "tiles.py"


IMPORTS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in LIBRARIES:
            raise ModuleNotFoundError(f"No module named {name!r}")
LIBRARIES = {"accelerate", "datasets", "numpy", "packaging", "pyarrow", "rich", "safetensors",
             "tqdm", "transformers", "triton", "trl", "typer"}
sys.meta_path.insert(0, Missing())
import fastpref, fastpref.data, fastpref.inspection, fastpref.models, fastpref.parallel
import fastpref.teacher
print(fastpref.__version__)
"""


def test_importing_needs_torch_only():
    """`make check-install` asks the same of an installed wheel, and more."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == fastpref.__version__, found.stderr


def test_what_needs_an_extra_says_so():
    require_extra("teacher", "some_function", "torch")
    advice = "some_function needs no_such_library: pip install '.[teacher]' in a clone of fastpref"
    with pytest.raises(ImportError, match=re.escape(advice)):
        require_extra("teacher", "some_function", "torch", "no_such_library")


@pytest.mark.parametrize("name", fastpref.__all__)
def test_every_public_name_is_documented(name):
    assert getattr(fastpref, name).__doc__


# What each part may import of fastpref besides itself.
MAY_IMPORT = {
    "checks": (),
    "derivatives": (),
    "extras": (),
    "files": (),
    "kernels": (),
    "data": ("checks", "extras"),
    "sequences": ("checks",),
    "ops": (
        "checks",
        "derivatives",
        "kernels.divergences",
        "kernels.logsumexp",
        "kernels.statistics",
        "kernels.tiles",
        "parallel",
    ),
    # ops imports it where a head is spread over processes
    "parallel": ("checks", "derivatives", "ops"),
    "responses": ("checks", "sequences"),
    "rewards": ("checks", "ops", "sequences"),
    "losses": (
        *("checks", "derivatives", "kernels.pair_losses", "ops.backend"),
        *("responses", "sequences"),
    ),
    "linear_losses": ("checks", "losses", "ops", "responses", "sequences"),
    "models": ("checks", "extras", "files", "ops", "rewards"),
    "teacher": (
        *("checks", "data", "derivatives", "extras", "files", "models", "ops", "sequences"),
    ),
    "integrations": (),
    "integrations.trl": (
        *("checks", "data", "extras", "losses", "models"),
        *("ops", "responses", "sequences", "teacher"),
    ),
    "inspection": ("checks", "data", "extras", "models", "ops", "sequences", "teacher"),
    "cli": (
        *("__version__", "checks", "data", "extras", "inspection", "integrations.trl.command"),
        *("models", "screen", "teacher"),
    ),
    "screen": ("inspection", "teacher"),
    "__main__": ("cli",),
    "__init__": (
        *("data", "linear_losses", "losses", "ops"),
        *("responses", "rewards", "teacher"),
    ),
}
MODULES = {
    ".".join(file.relative_to(ROOT / "fastpref").with_suffix("").parts): file
    for file in sorted((ROOT / "fastpref").rglob("*.py"))
} | {f"kernels.{file.stem}": file for file in sorted((ROOT / "kernels").rglob("*.py"))}


def imports_of(module: str, source: str) -> Iterator[str]:
    """Names within fastpref that a module imports, wherever in its source and however written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["fastpref", *module.split(".")][: -node.level] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        ours = (name for name in names if name.split(".")[0] == "fastpref")
        yield from (name.removeprefix("fastpref.") for name in ours)


def trespasses(module: str, source: str) -> list[str]:
    """What a module imports without leave."""
    part = max((one for one in MAY_IMPORT if f"{module}.".startswith(f"{one}.")), key=len)
    allowed = (part, *MAY_IMPORT[part])
    return [
        name
        for name in imports_of(module, source)
        if not any(name == one or name.startswith(f"{one}.") for one in allowed)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_data_flows_one_way(module):
    """Primitives know no preferences, losses no vocabularies, kernels neither."""
    assert trespasses(module, MODULES[module].read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.head", "from fastpref.losses import tvkd_loss"),
        ("ops.head", "from ..losses import tvkd_loss"),
        ("ops.head", "from .. import losses"),
        ("ops.head", "def late():\n    import fastpref.losses.tvkd"),
        ("ops.head", "from fastpref import losses"),
        ("ops.head", "import fastpref"),
        ("ops.operands", "from fastpref.kernels.pair_losses import pairs"),
        ("kernels.tiles", "from ..ops import tiling"),
        ("kernels.tiles", "from fastpref.ops.tiling import carve"),
        ("losses.drdo", "from fastpref.kernels.tiles import fold_tile"),
        ("losses.drdo", "from fastpref import teacher"),
        ("sequences", "from .ops.backend import multiply"),
        ("teacher.model", "from fastpref.linear_losses import tvkd_loss"),
        ("data.rows", "from fastpref.teacher import add_shaping"),
    ],
)
def test_what_does_not_flow_is_seen(module, source):
    assert trespasses(module, source)
    part = module.split(".")[0]
    assert not trespasses(
        module, f"import torch\nfrom . import {part}\nfrom fastpref import {part}"
    )
