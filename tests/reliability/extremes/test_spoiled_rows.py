"""What is no number stays in its row, its response or its pair, and is seen there."""

from __future__ import annotations

import pytest
import torch
from every_function import FROZEN, Given, batch, same_bits
from full_logits import EVERY, TRAINED
from holding import leaves, results
from torch import Tensor

from fastpref.ops.divergences import KINDS

OF_KNOWN = (
    "linear_topk_divergence",
    "linear_topk_divergence_with_stats",
    "linear_topk_expectation",
)
OF_TEACHER = (*KINDS, "linear_divergence", "linear_divergence_with_stats")
OF_TEACHER += ("linear_token_preference", "teacher_means")
OF_MODELS = ("hidden", "teacher", "states")
OF_PAIRS = ("tvkd_loss", "drdo_loss")
# What each function reads of a row.
READ: dict[str, tuple[str, ...]] = {
    "hidden": (*TRAINED, *FROZEN, "linear_stats"),
    "teacher": OF_TEACHER,
    "known": OF_KNOWN,
    "means": tuple(FROZEN),
    "mean_bias": tuple(FROZEN),
    "entropy": tuple(FROZEN),
    "states": ("teacher_shaping", "sequence_rewards"),
    "values": ("shaping_from_values",),
    "logps": ("sum_responses",),
    "shaping": ("tvkd_loss",),
    "rewards": ("drdo_loss",),
    "oracle": ("drdo_loss",),
}
# Of these, terms of a sum, gradients of the hidden states do not depend.
ADDED = ("mean_bias", "entropy", "rewards", "oracle")


def spoiled(given: Given, name: str, what: float) -> Given:
    """Something in the first response: a state that is read, or what there is one of."""
    values = given[name].clone()
    if values.dim() == 1:
        values[0] = what
    else:
        values[0, -1] = what
    return given | {name: values}


def whole(name: str, given: Given, trained: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What a function returns, and gradients."""
    wanted = leaves(name, trained)
    found, _ = results(lambda one: EVERY[name](one, not trained), given, wanted)
    count = len(found) - len(wanted)
    return found[:count], found[count:]


def elsewhere(values: Tensor, name: str) -> Tensor:
    """All but what the spoiled row may reach; gradients of a loss reach both of a pair."""
    if values.dim() == 0:
        return values.new_zeros(0)
    kept = torch.ones(values.shape, dtype=torch.bool)
    if values.dim() == 1:
        kept[0] = False
    elif name in OF_PAIRS:
        kept[[0, 2]] = False
    else:
        kept[0, -1] = False
    return values[kept]


def at_row(values: Tensor) -> Tensor:
    return values if values.dim() == 0 else values[0] if values.dim() == 1 else values[0, -1]


@pytest.mark.parametrize(("what", "trained"), [(torch.nan, False), (torch.inf, True)])
def test_a_row_that_is_no_number(what, trained):
    given = batch() | {"transform": {}}
    assert given.keys() - READ.keys() == {
        "weight", "bias", "of_teacher", "ids", "labels", "reward_head", "transform"
    }  # fmt: skip
    assert {one for functions in READ.values() for one in functions} == EVERY.keys()
    clean = {function: whole(function, given, trained) for function in EVERY}
    for name, function in ((name, one) for name, functions in READ.items() for one in functions):
        if what == torch.inf and name not in OF_MODELS:
            continue  # a sum that is infinite, not NaN
        values, gradients = whole(function, spoiled(given, name, what), trained)
        told = f"{what} in {name} of {function}"
        expected, expected_gradients = clean[function]
        for one, other in zip(values, expected, strict=True):
            assert same_bits([elsewhere(one, "")], [elsewhere(other, "")]), told
        reached = [
            not torch.equal(at_row(one), at_row(other))
            for one, other in zip(values, expected, strict=True)
        ]
        assert any(reached), told
        for one, differs in zip(values, reached, strict=True):
            if differs and one.is_floating_point():
                assert at_row(one).isnan().all(), told
        if gradients:
            assert same_bits(
                [elsewhere(gradients[0], function)], [elsewhere(expected_gradients[0], function)]
            ), told
            if name in ADDED:
                assert same_bits(gradients, expected_gradients), told
                continue
            assert at_row(gradients[0]).isnan().all(), told
            for of_head in gradients[1:]:
                assert of_head.isnan().any(), told
