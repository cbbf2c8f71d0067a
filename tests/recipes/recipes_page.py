"""The code of a page, by section, and what `make recipes` installs."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
from pages import ROOT


def section_blocks(page: str, section: str, language: str = "python") -> list[str]:
    """The fenced blocks of a section, in their order."""
    sections = re.split(r"^## ", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE)
    (text,) = [one for one in sections if one.startswith(section + "\n")]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def needs(package: str) -> None:
    """Skip where `make recipes` has not installed it; what is there has to import."""
    if find_spec(package) is None:
        pytest.skip(f"make recipes installs {package}", allow_module_level=True)
