"""The code of docs/recipes.md, by section."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text("utf-8")


def blocks(section: str, language: str = "python") -> list[str]:
    """The fenced blocks of a section, in their order."""
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [one for one in sections if one.startswith(section + "\n")]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def needs(package: str) -> None:
    """Skip where `make recipes` has not installed it; what is there has to import."""
    if find_spec(package) is None:
        pytest.skip(f"make recipes installs {package}", allow_module_level=True)
