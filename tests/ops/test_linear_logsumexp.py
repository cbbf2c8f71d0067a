from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Case, cases, reference_logsumexp
from closeness import assert_no_worse
from hypothesis import given
from hypothesis import strategies as st

import fastpref
from fastpref import Head
from fastpref.ops.linear_logps_op import Found, linear_logps_backward_ops, linear_logps_ops


def run(case: Case) -> torch.Tensor:
    temperature = case.options["temperature"]
    return fastpref.linear_logsumexp(case.hidden, case.head, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases(), trained=st.booleans())
def test_equals_the_reference(dtype, case, trained):
    plain, ours = case.to(dtype, trained=trained), case.to(dtype, trained=trained)
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


@pytest.mark.parametrize("trained", [False, True])
def test_a_wholly_masked_vocabulary_has_no_gradient(trained):
    hidden = torch.randn(2, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=trained)
    values = fastpref.linear_logsumexp(hidden, Head(weight, torch.full((10,), -torch.inf)))
    assert (values == -torch.inf).all()
    values.sum().backward()
    assert (hidden.grad == 0).all()
    assert not trained or (weight.grad == 0).all()


@pytest.mark.parametrize("scratch_bytes", [0, 10**6])
def test_masked_rows_are_of_no_weight_in_the_gradients_of_others(scratch_bytes):
    """The operator itself, since no public function keeps a logsumexp's exponentials."""
    hidden, weight = torch.randn(3, 8), torch.randn(10, 8)
    operands = (hidden, weight, torch.full((10,), -torch.inf), None, 1.0, 1.0, None, -100, True)
    found = Found(*linear_logps_ops.of_all_rows(*operands, False, False, scratch_bytes))
    assert (found.lse == -torch.inf).all()
    left = (found.running, found.rows, found.n_rows, found.cache)
    gradients = linear_logps_backward_ops.of_all_rows(
        *operands, None, torch.ones(3), *left, True, True, True
    )
    assert all((gradient == 0).all() for gradient in gradients)
