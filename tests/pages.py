"""The blocks of code on the pages, for the tests that execute them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pages() -> list[str]:
    """Every page that is for readers, by its path in the repository."""
    found = ["README.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md"]
    return [path.relative_to(ROOT).as_posix() for name in found for path in ROOT.glob(name)]


def all_blocks(page: str, section: str = "") -> list[tuple[str, str]]:
    """The language and the code of every fenced block, of the page or of a section of it."""
    text = (ROOT / page).read_text("utf-8")
    if section:
        sections = re.split(r"^## ", text, flags=re.MULTILINE)
        (text,) = [one for one in sections if one.startswith(f"{section}\n")]
    return re.findall(r"^ *```([^\n`]*)\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str = "python", section: str = "") -> list[str]:
    """The code of the blocks in one language, of a page or of a section of it."""
    return [code for name, code in all_blocks(page, section) if name == language]


def commands(page: str, name: str = "") -> list[list[str]]:
    """The words of the command lines in a page's shell blocks that begin with a name."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0].startswith(name)]
