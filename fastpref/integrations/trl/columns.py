"""Numbers that a dataset holds for every pair, on their way to the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

SIDES = ("chosen", "rejected")


def columns_of(signal: str) -> tuple[str, str]:
    """The dataset's columns of a signal such as "shaping", of chosen and rejected responses."""
    chosen, rejected = (f"{side}_{signal}" for side in SIDES)
    return chosen, rejected


@dataclass
class CollatorWithColumns:
    """TRL's collator, and beside its tensors one (B,) float32 tensor a column."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, ...]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, refusing rows without a number."""
        batch = dict(self.collator(examples))
        for column in self.columns:
            values = [example.get(column) for example in examples]
            for value in values:
                if not isinstance(value, Real) or not math.isfinite(value):
                    raise ValueError(
                        f"{column}: expected a finite number in every row, got {value!r}"
                    )
            batch[column] = torch.tensor(values, dtype=torch.float32)
        return batch


def missing_columns(dataset: Any, columns: Sequence[str]) -> list[str]:
    """Those of ``columns`` that the first row of a dataset lacks."""
    first: dict[str, Any] = next(iter(dataset), {})
    return [column for column in columns if column not in first]


def stacked(batch: dict[str, Any], signal: str) -> Tensor:
    """(2B,) a signal of chosen and then of rejected responses."""
    return torch.cat([batch[column] for column in columns_of(signal)])
