"""Shapes at the ends of what is allowed, as full logits have them."""

from __future__ import annotations

import math
from typing import Any

import formulas
import pytest
import torch
from every_function import LABELS, batch
from full_logits import EVERY, TRAINED
from holding import hold_to_full_logits

import fastpref

OF_PAIRS = ("tvkd_loss", "drdo_loss", "teacher_shaping", "sequence_rewards", "shaping_from_values")
ONLY_TOKEN = LABELS.masked_fill(LABELS != -100, 0)
NOTHING = torch.tensor([[-100, -100], [-100, -100]])
SHAPES: dict[str, dict[str, Any]] = {
    "a vocabulary of one": {"vocab": 1, "labels": ONLY_TOKEN},
    "a vocabulary of two": {"vocab": 2, "labels": ONLY_TOKEN + (LABELS > 3)},
    "one hidden unit": {"width": 1},
    "one row": {"labels": torch.tensor([[4]])},
    "no rows": {"labels": torch.zeros(0, 1, dtype=torch.int64)},
    "no columns": {"labels": torch.zeros(2, 0, dtype=torch.int64)},
    "sequences of one token": {"labels": torch.tensor([[3], [4]])},
    "responses of an end token alone": {"labels": torch.tensor([[-100, -100, 2], [-100, 2, -100]])},
    "no response": {"labels": NOTHING},
}


def each_function(turn: int) -> list[tuple[str, bool]]:
    """Every function, and whether the head trains: it does at every other turn."""
    return [(name, name in TRAINED and (place + turn) % 2 == 0) for place, name in enumerate(EVERY)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    given = batch(**SHAPES[shape])
    for name, trained in each_function(list(SHAPES).index(shape)):
        ways = name, given, torch.float32
        options = {"trained": trained, "compact": not trained, "as_full": given}
        if name in OF_PAIRS and len(given["labels"]) < 2:
            with pytest.raises(ValueError, match=r"labels: expected shape \(2B, T\)"):
                EVERY[name](given, not trained)
        else:
            hold_to_full_logits(*ways, **options)


def test_chosen_and_rejected_are_the_same():
    given = {
        name: torch.cat((one[:2], one[:2])) if len(one) == 4 else one
        for name, one in batch().items()
    }
    for name, trained in each_function(0):
        hold_to_full_logits(
            name, given, torch.float32, trained=trained, compact=trained, as_full=given
        )
    found = fastpref.tvkd_loss(
        given["hidden"], given["weight"], given["labels"], given["shaping"], beta=1e3
    )
    assert found.loss.item() == pytest.approx(math.log(2), rel=1e-6)


ROWS = 10**6


def test_a_million_rows():
    """Of two tokens; two hidden units, as of one BLAS sums a million terms one by one."""
    random = torch.Generator().manual_seed(7)
    hidden, teacher = (2 * torch.randn(ROWS, 2, generator=random) for _ in range(2))
    labels = torch.randint(2, (ROWS,), generator=random)
    weight, of_teacher = torch.tensor([[1.0, 0.5], [-1.0, 0.5]]), torch.eye(2)
    head = weight.clone().requires_grad_()
    divergence = fastpref.linear_divergence(
        hidden, head, teacher, of_teacher, labels, kind="forward_kl"
    )
    found = [fastpref.linear_logps(hidden, head, labels), divergence]
    exact_head = weight.double().requires_grad_()
    student = hidden.double(), exact_head
    right = [
        formulas.linear_logps(*student, labels),
        formulas.linear_divergence(
            student, (teacher.double(), of_teacher.double()), labels, kind="forward_kl"
        ),
    ]
    for one, expected in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(one.sum(), head)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), exact_head)
        error = (gradient.double() - expected_gradient).norm()
        assert error <= 1e-5 * expected_gradient.norm()
    with torch.no_grad():
        means = fastpref.teacher_means(teacher, of_teacher, weight, labels)
        cached = fastpref.linear_cached_kl(hidden, weight, means, labels)
    torch.testing.assert_close(cached.double(), right[1].detach(), rtol=1e-5, atol=5e-6)
