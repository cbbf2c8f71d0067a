"""The package for the Hub's library `kernels`, imported as that does it.

`make check-install` loads it with the library itself, which must not be installed here: where it
is, transformers takes kernels from the Hub.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hub_package import check_page, operators
from pages import blocks

import fastpref

ROOT = Path(__file__).parents[1]
PAGE = "docs/hub_kernels.md"
SCRIPT = runpy.run_path(str(ROOT / ".ci" / "hub_kernels.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    SCRIPT["main"](home / "build" / "hub-kernels")
    return home


def load(repository: Path, backend: str = "cpu") -> ModuleType:
    variant = repository / "build" / f"torch-{backend}"
    name = json.loads((variant / "metadata.json").read_text("utf-8"))["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_the_page(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_local_kernel=load))
    assert check_page(PAGE).__all__ == fastpref.ops.__all__


def test_the_commands_of_the_page():
    (shell,), (code,) = blocks(PAGE, "sh"), blocks(PAGE)
    layout, install = shell.splitlines()
    command = ["make", "-n", "--no-print-directory", *layout.split()[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    last = done.stdout.decode().splitlines()[-1]
    assert last.endswith(" .ci/hub_kernels.py build/hub-kernels")
    assert '(Path("build/hub-kernels"))' in code
    assert install == "pip install kernels"


def test_copies_do_not_touch_one_another(folder):
    """Two builds and fastpref, all in this process: each has operators of its own."""
    packages = [load(folder / "build" / "hub-kernels", backend) for backend in ("cpu", "cuda")]
    first, second = (operators(package.__name__) for package in packages)
    assert first == second and "linear_logps" in first
    assert first < operators("fastpref")
    states, labels = torch.randn(4, 8), torch.tensor([1, 2, 3, 4])
    found = []
    for package in (*packages, fastpref):
        weight = torch.ones(20, 8, requires_grad=True)
        with torch.profiler.profile() as profile:
            package.linear_logps(states, weight, labels).sum().backward()
        called = {event.key for event in profile.key_averages() if event.key.endswith("_rows")}
        assert called == {f"{package.__name__}::linear_logps_of_labelled_rows"} | {
            f"{package.__name__}::linear_logps_backward_of_labelled_rows"
        }
        found.append(weight.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_every_module_stands_alone(folder):
    """Also those that are imported late: for kernels, or for heads on several processes."""
    pytest.importorskip("triton")
    package = load(folder / "build" / "hub-kernels")
    root = Path(package.__file__).parent
    files = {file.relative_to(root) for file in root.rglob("*.py")}
    assert {Path("kernels/tiles.py"), Path("parallel/vocab_divergence.py")} < files
    for file in files - {Path("__init__.py")}:
        name = ".".join((package.__name__, *file.with_suffix("").parts))
        module = importlib.import_module(name.removesuffix(".__init__"))
        ours = [one for one in vars(module).values() if isinstance(one, type)]
        assert not [one for one in ours if one.__module__.startswith("fastpref")], name


def test_what_cannot_be_rewritten_is_refused():
    relative = SCRIPT["relative"]
    text = 'from fastpref.ops.head import Head\n\ncustom_op("fastpref::one")\n'
    assert relative("checks.py", text).startswith("from .ops.head import Head\n")
    assert relative("ops/deep/one.py", text).startswith("from ...ops.head import Head\n")
    for bad in ("import fastpref.ops", "from fastpref import Head", "custom_op('fastpref::one')"):
        with pytest.raises(SystemExit, match="ops/one.py: an import or an operator"):
            relative("ops/one.py", bad)


def test_another_source_has_another_name(folder, tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    text = (ROOT / "kernels" / "build.toml").read_text("utf-8")
    (tmp_path / "kernels" / "build.toml").write_text(text.replace("version = 0", "version = 1"))
    (tmp_path / "LICENSE").touch()
    monkeypatch.setitem(SCRIPT["main"].__globals__, "ROOT", tmp_path)
    SCRIPT["main"](tmp_path / "other")
    path = Path("build", "torch-cpu", "metadata.json")
    first, second = (
        json.loads((one / path).read_text("utf-8"))
        for one in (folder / "build" / "hub-kernels", tmp_path / "other")
    )
    assert first["id"] != second["id"] and second["version"] == 1
