"""What `make recipes` installs."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(package: str) -> None:
    """Skip where `make recipes` has not installed it; what is there has to import."""
    if find_spec(package) is None:
        pytest.skip(f"make recipes installs {package}", allow_module_level=True)
