"""The operators that losses are made of, as PyTorch expects operators to be."""

from __future__ import annotations

import pytest
import torch
from fastpref.losses.fused import drdo_pairs_op, tvkd_pairs_op
from torch.library import opcheck

from fastpref.ops.backend import uses_triton
from fastpref.sequences import _checked_boundaries

needs_triton = pytest.mark.skipif(
    not uses_triton(torch.zeros(1)), reason="the pair kernels need TRITON_INTERPRET=1 or a GPU"
)

LABELS = torch.tensor([1, 2, -100, 3, -100, 4, 5, -100, -100])
BOUNDARIES = torch.tensor([0, 3, 5, 8, 9])
MASK = LABELS != -100


def logps() -> torch.Tensor:
    return (-torch.rand(9)).requires_grad_()


@needs_triton
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_tvkd_pairs(optional):
    ref_logps, token_weights = (torch.randn(4), torch.rand(9)) if optional else (None, None)
    given = (logps(), MASK, BOUNDARIES, torch.randn(4), ref_logps, token_weights)
    opcheck(tvkd_pairs_op, (*given, 0.1, 1.0, 0.1, optional))


@needs_triton
@pytest.mark.parametrize("length_normalize", [False, True])
def test_opcheck_drdo_pairs(length_normalize):
    given = (logps(), MASK, BOUNDARIES, torch.randn(4, requires_grad=True), torch.randn(4))
    opcheck(drdo_pairs_op, (*given, 0.1, 2.0, length_normalize, False))


def test_opcheck_checked_boundaries():
    opcheck(_checked_boundaries, (BOUNDARIES, LABELS, -100))
