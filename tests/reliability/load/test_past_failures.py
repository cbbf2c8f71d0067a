"""What was once wrong, and what no other test would notice again."""

from __future__ import annotations

import formulas
import pytest
import torch
from torch import Tensor

from fastpref import linear_divergence


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "total_variation", "skew_reverse_kl"])
def test_the_top_of_a_certain_student_keeps_its_gradient(kind):
    """It is what all others sum up to: relative to the mean, float32 has a few digits of it."""
    logits, teacher, eye = torch.randn(5, 40), torch.randn(5, 40), torch.eye(40)
    logits[:, 4] += 15
    labels = torch.zeros(5, dtype=torch.int64)

    def gradient(found: Tensor, student: Tensor) -> Tensor:
        return torch.autograd.grad(found.sum(), student)[0][:, 4]

    student, wide = (one.requires_grad_() for one in (logits.clone(), logits.double()))
    found = linear_divergence(student, eye, teacher, eye, labels, kind=kind)
    models = (wide, eye.double()), (teacher.double(), eye.double())
    exact = formulas.linear_divergence(*models, labels, kind=kind)
    torch.testing.assert_close(
        gradient(found, student).double(), gradient(exact, wide), rtol=1e-5, atol=0
    )
