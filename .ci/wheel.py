"""Build the sdist and the wheel of a committed version into dist/; `make wheel` calls it.

Everything is built twice, from the files of the commit and from the working tree, and has to come
out the same, byte for byte: a build depends on the commit and on constraints.txt, nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Refuse what must not be released, build, compare, check, and print checksums."""
    refuse_changes(git("status", "--porcelain").decode())
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version = version_of((ROOT / "fastpref" / "__init__.py").read_text("utf-8"))
    refuse_unknown_version(version, changelog_versions(changelog))
    refuse_unreleased(changelog)
    # Zip and tar files hold times.
    variables = os.environ | {
        "SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").decode().strip()
    }
    with TemporaryDirectory() as name:
        commit, first, second = (Path(name) / one for one in ("commit", "first", "second"))
        with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD"))) as archive:
            archive.extractall(commit, filter="tar")
        for source, output in ((commit, first), (ROOT, second)):
            pins = ("--dependency-constraints-txt", ROOT / "constraints.txt")
            run("build", *pins, "--outdir", output, source, env=variables)
        files = sorted(first.iterdir())
        for file in files:
            if file.read_bytes() != (second / file.name).read_bytes():
                raise SystemExit(f"{file.name}: another build of the same commit has other bytes")
        run("twine", "check", "--strict", *files)
        (ROOT / "dist").mkdir(exist_ok=True)
        for file in files:
            shutil.copy(file, ROOT / "dist")
            print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  dist/{file.name}")


def git(*arguments: str) -> bytes:
    """What git prints in this repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def run(module: str, *arguments: object, env: dict[str, str] | None = None) -> None:
    """Run a module of this script's own Python."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, env=env)


def refuse_changes(status: str) -> None:
    """Refuse a tree that is not what its commit says."""
    if status:
        raise SystemExit(f"make wheel: commit these changes first, or stash them:\n{status}")


def refuse_unknown_version(version: str, changelog: list[str]) -> None:
    """Refuse a version of which the changelog says nothing, or that is not its newest."""
    if version not in changelog[:1]:
        raise SystemExit(
            f"make wheel: fastpref.__version__ is {version}, but the newest version in "
            f"CHANGELOG.md is {changelog[0] if changelog else 'none'}"
        )


def refuse_unreleased(changelog: str) -> None:
    """Refuse changes that the changelog gives no version to: this one would hold them, too."""
    unreleased = changelog.partition("## [Unreleased]")[2].partition("\n## ")[0]
    if re.search(r"^- ", unreleased, flags=re.MULTILINE):
        raise SystemExit(
            f"make wheel: CHANGELOG.md has changes under Unreleased; move them to a version:"
            f"{unreleased.rstrip()}"
        )


def version_of(source: str) -> str:
    """``__version__`` in the source of a module, which would need PyTorch to be imported."""
    (version,) = re.findall(r'^__version__ = "(.*?)"', source, flags=re.MULTILINE)
    return str(version)


def changelog_versions(text: str) -> list[str]:
    """Versions that have an entry with a date, the newest first."""
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
