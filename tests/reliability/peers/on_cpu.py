"""Tests that are written for one GPU, on a CPU: the same calls with another device's name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _OnCPU(TorchFunctionMode):
    """Makes tensors on the CPU that were asked for on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        return func(*args, **named)


@contextlib.contextmanager
def on_cpu(module: str) -> Iterator[None]:
    """Tell a module of tests that there is a GPU, and give it the CPU; PyTorch knows better."""
    asked = torch.cuda.is_available

    def is_available() -> bool:
        return sys._getframe(1).f_globals.get("__name__") == module or asked()

    there = mock.patch.object(torch.cuda, "is_available", is_available)
    seeded = mock.patch.object(torch.cuda, "manual_seed", torch.manual_seed)
    with there, seeded, _OnCPU():
        yield
