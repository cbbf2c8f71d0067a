"""Arguments that functions accept, and how they refuse others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastpref
from fastpref import Head

HEADED = ("linear_logps", "linear_logsumexp", "tvkd_loss", "drdo_loss", "teacher_shaping")
LOSSES = ("tvkd_loss", "drdo_loss")
OF_STATES = ("teacher_shaping", "shaping_from_values", "sequence_rewards")
OF_PAIRS = (*LOSSES, *OF_STATES)
PER_SEQUENCE = [
    ("tvkd_loss", "shaping"),
    ("tvkd_loss", "ref_logps"),
    ("drdo_loss", "student_rewards"),
    ("drdo_loss", "oracle_rewards"),
]
WRONG_OR_RIGHT = [
    [0, 4, 8, 12, 16],  # the one that is right
    [1, 4, 8, 12, 16],
    [0, 4, 8, 12, 15],
    [0, 4, 8, 12, 99],
    [0, 8, 4, 12, 16],
    [0, 4, 8, 12, -16],
    [0, 0, 0, 0, 0],
    [16, 16, 16, 16, 16],
    [0, 99, 99, 99, 99],
]


def arguments(name: str, *, packed: bool = False) -> dict[str, Any]:
    """Four sequences of three labels, H = 8, V = 20, that ``name`` accepts."""
    labels = torch.tensor([[1, 2, 3], [-100, 4, -100], [5, -100, 6], [-100, 7, 8]])
    positions = (16,) if packed else (4, 4 if name in OF_STATES else 3)
    found: dict[str, Any] = {"hidden": torch.randn(*positions, 8), "labels": labels}
    if packed:
        found["labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100).reshape(-1)
        found["cu_seqlens"] = torch.arange(5) * 4
    if name in HEADED:
        found["head"] = torch.randn(20, 8)
    if name == "linear_logsumexp":
        del found["labels"]
    if name == "tvkd_loss":
        found["shaping"] = torch.zeros(4)
    if name == "drdo_loss":
        found |= {"student_rewards": torch.zeros(4), "oracle_rewards": torch.zeros(4)}
    if name == "sequence_rewards":
        found["head_weight"] = torch.randn(1, 8)
    if name == "shaping_from_values":
        found["values"] = found.pop("hidden")[..., 0]
    return found


def call(name: str, given: dict[str, Any]) -> Any:
    """The function of a name; what belongs to a head goes into it."""
    parts = {one: given[one] for one in Head._fields if one in given}
    if parts:
        rest = {one: value for one, value in given.items() if one not in parts}
        given = {**rest, "head": Head(**{"weight": given.get("head"), **parts})}
    return getattr(fastpref, name)(**given)


def refused(
    name: str,
    argument: str,
    expected: str,
    got: str,
    *,
    packed: bool = False,
    **changes: Any,
) -> None:
    """``name`` refuses ``changes`` to its arguments in these words."""
    with pytest.raises(ValueError) as caught:
        call(name, {**arguments(name, packed=packed), **changes})
    message = str(caught.value)
    named, _, rest = message.partition(": expected ")
    wanted, _, came = rest.rpartition(", got ")
    assert named == argument, message
    assert expected in wanted, message
    assert got in came, message
