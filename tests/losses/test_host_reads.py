"""How often the host waits for a tensor: once in forward, never without compaction."""

from __future__ import annotations

from typing import Any

import pytest
from bad_input import LOSSES, arguments
from torch import Tensor

import fastpref


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """What the host read from a tensor, of all ways that the code knows."""
    found: list[str] = []
    for way in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero"):
        original = getattr(Tensor, way)

        def noting(self: Tensor, *rest: Any, way: str = way, original: Any = original) -> Any:
            found.append(way)
            return original(self, *rest)

        monkeypatch.setattr(Tensor, way, noting)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", [*LOSSES, "teacher_shaping"])
def test_how_often_the_host_reads(reads, name, trained, packed):
    given = arguments(name, packed=packed)
    given["hidden"].requires_grad_()
    given["head"].requires_grad_(trained)

    def run(*, compact: bool) -> int:
        reads.clear()
        found = getattr(fastpref, name)(**given, compact=compact)
        in_forward = len(reads)
        if name in LOSSES:
            found.loss.backward()
        # The backward pass knows the number of rows from a tensor that lies on the host.
        assert reads[in_forward:] in ([], ["__int__"] if compact else [])
        return in_forward

    assert run(compact=False) == 0
    # The labels, and with them the boundaries in a loss.
    assert run(compact=True) == (1 if name in LOSSES else 1 + packed)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_two_models_are_not_waited_for_either(reads, packed):
    given = arguments("teacher_shaping", packed=packed)
    given |= {"reference_hidden": given["hidden"] + 1, "reference_head": given["head"]}
    found = fastpref.teacher_shaping(**given, potential="implicit_reward", compact=False)
    assert not reads and found.isfinite().all()
    if packed:
        given["cu_seqlens"] = given["cu_seqlens"].flip(0)
        wrong = fastpref.teacher_shaping(**given, potential="implicit_reward", compact=False)
        assert wrong.isnan().all()
