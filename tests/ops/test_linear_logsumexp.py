from __future__ import annotations

import pytest
import torch
from closeness import assert_no_worse
from heads import DTYPES, Head, heads, reference_logsumexp
from hypothesis import given
from hypothesis import strategies as st

import fastpref


def run(head: Head) -> torch.Tensor:
    options = {k: v for k, v in head.options.items() if k != "ignore_index"}
    return fastpref.linear_logsumexp(head.hidden, head.weight, bias=head.bias, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(head=heads(), trained=st.booleans())
def test_equals_the_reference(dtype, head, trained):
    plain, ours = head.to(dtype, trained=trained), head.to(dtype, trained=trained)
    exact = ours.to(torch.float64, trained=trained)
    with torch.no_grad():
        without_gradient = run(ours)
    expected, rough, found = reference_logsumexp(exact), reference_logsumexp(plain), run(ours)
    for values in (found, without_gradient):
        assert_no_worse(values, rough, expected, dtype)
    incoming = torch.randn(found.shape, dtype=torch.float64)
    for values in (expected, rough, found):
        values.backward(incoming.to(values.dtype))
    for gradients in zip(ours.gradients(), plain.gradients(), exact.gradients(), strict=True):
        assert_no_worse(*gradients, dtype)
