"""Models, pairs and pages that the tests of inspections share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from tokenizers import decoders

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def readable_tokenizer() -> Any:
    """A tiny tokenizer whose tokens decode to the text that they were made of."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def dom_of(page: Path, profile: Path) -> str:
    """A page as Chromium has it after its scripts have run."""
    assert CHROMIUM is not None
    options = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync virtual-time-budget=3000 dump-dom"
    )
    command = [CHROMIUM, f"--user-data-dir={profile}", *(f"--{one}" for one in options.split())]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True)
    return done.stdout
