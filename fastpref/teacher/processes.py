"""This process among those that ``torchrun`` or ``accelerate launch`` started."""

from __future__ import annotations

from typing import Any

import torch


def this_process() -> Any:
    """Accelerate's view of it: its device, its number, how many there are."""
    from accelerate import PartialState

    # Without an accelerator it would take processes on CPUs for strangers unless told.
    return PartialState(cpu=not torch.accelerator.is_available())
