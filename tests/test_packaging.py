"""How the package is put together."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fastpref

ROOT = Path(fastpref.__file__).resolve().parents[1]


def test_kernels_never_shadow_the_hubs_package():
    """`import kernels` at the repository root must not find ours: transformers wants the Hub's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    probe = "import kernels; print(getattr(kernels, '__file__', None))"
    found = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "No module named" in found.stderr or str(ROOT / "kernels") not in found.stdout


def test_kernels_are_found_inside_the_package():
    spec = importlib.util.find_spec("fastpref.kernels.tiles")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / "kernels" / "tiles.py"


@pytest.mark.parametrize("name", fastpref.__all__)
def test_every_public_name_is_documented(name):
    assert getattr(fastpref, name).__doc__


def test_data_flows_one_way():
    """Primitives know no preferences, losses no vocabularies, kernels neither."""
    forbidden = {
        "fastpref/ops": ("fastpref.losses", "fastpref.teacher", "fastpref.reference"),
        "fastpref/losses": (
            "fastpref.reference",
            "fastpref.kernels.logsumexp",
            "fastpref.kernels.tiles",
        ),
        "kernels": ("fastpref.ops", "fastpref.losses", "fastpref.reference"),
    }
    for folder, names in forbidden.items():
        for file in (ROOT / folder).glob("*.py"):
            imports = [line for line in file.read_text().splitlines() if "import" in line]
            for name in names:
                assert not any(name in line for line in imports), f"{file} imports {name}"
