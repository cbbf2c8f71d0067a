"""Versions, the changelog, and what `make wheel` refuses."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import fastpref

ROOT = Path(fastpref.__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / ".ci" / "wheel.py"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_newest_version_in_the_changelog_is_this_one():
    versions = SCRIPT["changelog_versions"](CHANGELOG)
    assert versions[0] == fastpref.__version__
    assert CHANGELOG.index("## [Unreleased]") < CHANGELOG.index(f"## [{versions[0]}]")
    order = [tuple(map(int, version.split("."))) for version in versions]
    assert order == sorted(set(order), reverse=True)


def test_the_version_is_read_without_an_import():
    source = Path(fastpref.__file__).read_text("utf-8")
    assert SCRIPT["version_of"](source) == fastpref.__version__


def test_a_version_without_an_entry_is_refused():
    refuse = SCRIPT["refuse_unknown_version"]
    refuse("0.1.0", ["0.1.0", "0.0.1"])
    for versions in (["0.0.1"], ["0.2.0", "0.1.0"], []):
        with pytest.raises(SystemExit, match=r"__version__ is 0\.1\.0, but the newest version"):
            refuse("0.1.0", versions)


def test_a_version_without_a_date_has_no_entry():
    text = "## [Unreleased]\n\n## [0.3.0]\n\n## [0.2.0] - 2026-01-31\n\n## 0.1.0 - 2026-01-30\n"
    assert SCRIPT["changelog_versions"](text) == ["0.2.0"]


def test_changes_without_a_version_are_refused():
    text = "## [Unreleased]\n\nNothing yet.\n\n## [0.1.0] - 2026-01-31\n\n### Added\n\n- All.\n"
    SCRIPT["refuse_unreleased"](text)
    with pytest.raises(SystemExit, match="under Unreleased.*\n\n### Added\n\n- More"):
        SCRIPT["refuse_unreleased"](text.replace("Nothing yet.", "### Added\n\n- More"))


def test_changes_are_refused():
    SCRIPT["refuse_changes"]("")
    with pytest.raises(SystemExit, match=r"commit these changes.*\n \?\? fastpref/new\.py"):
        SCRIPT["refuse_changes"](" ?? fastpref/new.py\n")


def test_nothing_says_that_fastpref_is_on_an_index():
    """No distribution of that name has been uploaded, and somebody else could upload one."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("**/*.md")]
    pages += [*(ROOT / "examples").glob("**/*"), *(ROOT / "fastpref").glob("**/*.py")]
    said = ("pip install fastpref", "pip install 'fastpref", 'pip install "fastpref')
    texts = {page: page.read_text("utf-8", errors="ignore") for page in pages if page.is_file()}
    assert [page for page, text in texts.items() if any(one in text for one in said)] == []
