"""Refuse a site that loads something from a network."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

LOADED = re.compile(
    r"""<(?:img|script|link|iframe|source)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]*)"""
)


def setup(app: Sphinx) -> dict[str, bool]:
    """Look at every page that was built."""
    app.connect("build-finished", _look)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _look(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and (found := loaded(Path(app.outdir))):
        raise ExtensionError(f"expected pages that need no network, got {found}")


def loaded(site: Path) -> list[str]:
    """What the pages in a folder load from elsewhere; links for readers are none of it."""
    pages = (page.read_text("utf-8") for page in sorted(site.rglob("*.html")))
    return [address for page in pages for address in LOADED.findall(page)]
