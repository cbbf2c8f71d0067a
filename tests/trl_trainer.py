"""Tests that run TRL's own trainer."""

from __future__ import annotations

from importlib.metadata import version

import pytest

# Its kernels are Triton's alone, whatever the device.
needs_trls_trainer = pytest.mark.skipif(
    version("trl").startswith("1.15."), reason="TRL 1.15's own trainer needs a GPU"
)
