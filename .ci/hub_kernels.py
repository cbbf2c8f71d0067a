"""Lay out the primitives and their kernels as the Hub's library `kernels` loads them.

.ci/hub_kernels.py FOLDER    FOLDER must not exist; `make hub-kernels` calls it

The library imports a package under a name of its own, beside any other version of it. So imports
become relative, and operators get a namespace that no other version has: docs/hub_kernels.md.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
import tomllib
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "fastpref"
ENTRY = "ops/__init__.py"  # what it imports is packed, and all that this imports
OURS = re.compile(r"^(\s*from )fastpref\.", flags=re.MULTILINE)
FOREIGN = re.compile(r"^\s*(from|import) fastpref\b|fastpref::", flags=re.MULTILINE)
NAMESPACE = '"fastpref::'  # of operators
INIT = '''"""Log-probabilities, statistics and divergences of a language-model head."""

from .ops import *
from .ops import __all__ as __all__
'''
CARD = """---
library_name: kernels
license: {license}
---

# {name}

Log-probabilities, statistics and divergences of a language-model head, with gradients, without the
logits: Triton kernels on GPUs, PyTorch elsewhere. Needs PyTorch 2.10 and Python 3.11, or later.

It has {names}.
"""


def main(folder: Path) -> None:
    """Write a repository of the Hub: one build for each backend, all of the same sources."""
    general = tomllib.loads((ROOT / "kernels" / "build.toml").read_text("utf-8"))["general"]
    sources = {path: relative(path, text) for path, text in sorted(packed().items())}
    sources["__init__.py"] = INIT
    content = hashlib.sha256(json.dumps([general, sources]).encode()).hexdigest()[:8]
    folder.mkdir(parents=True)
    for backend in general["backends"]:
        identifier = f"_{general['name'].replace('-', '_')}_{backend}_{content}"
        files = {
            path: text.replace(NAMESPACE, f'"{identifier}::') for path, text in sources.items()
        }
        metadata = {
            "name": general["name"],
            "id": identifier,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests(files)},
        }
        files["metadata.json"] = json.dumps(metadata, indent=2) + "\n"
        for path, text in files.items():
            file = folder / "build" / f"torch-{backend}" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
    names = ", ".join(f"`{name}`" for name in public_names(sources[ENTRY]))
    (folder / "README.md").write_text(CARD.format(names=names, **general), "utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    print(f"{folder}: {general['name']}, {len(sources)} modules for each of {general['backends']}")


def packed() -> dict[str, str]:
    """Files of the library that `ENTRY` needs, relative to it, with their sources."""
    found: dict[str, str] = {}
    waiting = {ENTRY}
    while waiting:
        path = waiting.pop()
        found[path] = (LIBRARY / path).read_text("utf-8")
        waiting |= set(imported(path, found[path])) - set(found)
    return found


def imported(path: str, source: str) -> Iterator[str]:
    """Files that one file imports, wherever in its source, and those of their packages."""
    package = ["fastpref", *Path(path).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        start = package[: len(package) + 1 - node.level] if node.level else []
        module = [*start, *(node.module.split(".") if node.module else [])]
        for name in node.names if module[0] == "fastpref" else []:
            parts = [*module[1:], name.name]
            for end in range(1, len(parts) + 1):
                here = Path(*parts[:end])
                for file in (here / "__init__.py", here.with_suffix(".py")):
                    if (LIBRARY / file).is_file():
                        yield file.as_posix()


def relative(path: str, source: str) -> str:
    """The source of one file with relative imports, and nothing else that knows of fastpref."""
    source = OURS.sub(r"\1" + "." * len(Path(path).parts), source)
    if FOREIGN.search(source.replace(NAMESPACE, "")):
        raise SystemExit(f"{path}: an import or an operator of fastpref that is not rewritten")
    return source


def digests(files: dict[str, str]) -> dict[str, str]:
    """SHA-256 of every file, as the library checks what it has downloaded."""
    return {
        path: b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(files.items())
    }


def public_names(source: str) -> list[str]:
    """What a module lists in ``__all__``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise SystemExit(f"{ENTRY} has no __all__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
