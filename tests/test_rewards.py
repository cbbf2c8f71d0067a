from __future__ import annotations

import math
from typing import Any

import formulas
import pytest
import torch
from batches import DTYPES, Batch, batches, hold_equal, hold_to_reference, some_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import sequence_rewards

NAMES = ("states", "head_weight", "head_bias")


def head(batch: Batch, biased: bool) -> dict[str, Tensor]:
    found = {"head_weight": batch.normal(1, batch.states.shape[-1])}
    return {**found, "head_bias": batch.normal(1)} if biased else found


def padded(batch: Batch, leaves: dict[str, Tensor], function: Any = sequence_rewards) -> Tensor:
    return function(
        leaves["states"],
        batch.labels,
        leaves["head_weight"],
        leaves.get("head_bias"),
        ignore_index=batch.ignore_index,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=batches(), biased=st.booleans(), trains=some_of(*NAMES))
def test_equals_the_reference(dtype, batch, biased, trains):
    more = head(batch, biased)
    hold_to_reference(
        lambda leaves: padded(batch, leaves),
        lambda leaves: padded(batch, leaves, formulas.sequence_rewards),
        lambda dtype: batch.leaves(dtype, trains, **more),
        dtype,
        scale=float((batch.states * more["head_weight"]).abs().sum(-1).max()),
    )


@given(batch=batches(), biased=st.booleans(), trains=some_of(*NAMES))
def test_packed_equals_padded(batch, biased, trains):
    more = head(batch, biased)

    def results(packed: bool) -> dict[str, Tensor]:
        leaves = batch.leaves(torch.float64, trains, **more)
        if packed:
            found = sequence_rewards(
                batch.pack(leaves["states"]),
                batch.packed_labels(),
                leaves["head_weight"],
                leaves.get("head_bias"),
                cu_seqlens=batch.cu_seqlens(),
                ignore_index=batch.ignore_index,
            )
        else:
            found = padded(batch, leaves)
        if found.requires_grad:
            (found * torch.arange(1, len(found) + 1)).sum().backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"rewards": found.detach(), **gradients}

    hold_equal(results(packed=True), results(packed=False))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_reads_the_state_after_the_last_label_and_no_other(packed):
    labels = torch.tensor([[5, -100, 6, -100], [-100, 7, -100, -100]])
    states = torch.full((2, 5, 2), math.nan)
    states[0, 3] = torch.tensor([1.0, 2.0])
    states[1, 2] = torch.tensor([3.0, 4.0])
    states.requires_grad_()
    arguments: tuple[Any, ...] = (states, labels)
    boundaries = None
    if packed:
        arguments = (states.reshape(-1, 2), torch.nn.functional.pad(labels, (0, 1), value=-100))
        arguments = (arguments[0], arguments[1].reshape(-1))
        boundaries = torch.tensor([0, 5, 10])
    found = sequence_rewards(*arguments, torch.tensor([10.0, 1.0]), cu_seqlens=boundaries)
    assert found.tolist() == [12.0, 34.0]
    found.sum().backward()
    assert states.grad.abs().sum(-1).nonzero().tolist() == [[0, 3], [1, 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_labels_is_worth_nothing(dtype):
    states = torch.randn(2, 4, 3, dtype=dtype, requires_grad=True)
    labels = torch.tensor([[-100, -100, -100], [-100, 1, -100]])
    linear = torch.nn.Linear(3, 1, dtype=dtype)
    found = sequence_rewards(states, labels, linear.weight, linear.bias)
    found.sum().backward()
    assert found[0] == 0 and found[1] != 0
    assert (states.grad[0] == 0).all() and (states.grad[1] != 0).any()
    assert linear.bias.grad == 1  # the other row's alone


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_row_without_labels_may_hold_anything(packed):
    states = torch.randn(2, 4, 3)
    states[1] = math.nan
    labels = torch.tensor([[1, 2, 3, -100], [-100, -100, -100, -100]])
    weight = torch.randn(1, 3, requires_grad=True)
    states.requires_grad_()
    if packed:
        boundaries = torch.tensor([0, 4, 8])
        found = sequence_rewards(
            states.reshape(-1, 3), labels.reshape(-1), weight, cu_seqlens=boundaries
        )
    else:
        found = sequence_rewards(states, labels[:, :3], weight)
    found.sum().backward()
    assert found[1] == 0
    assert torch.equal(weight.grad, states.detach()[:1, 3])
    assert (states.grad[1] == 0).all()


@pytest.mark.parametrize("shape", [(1, 3), (3,)], ids=str)
@pytest.mark.parametrize("bias_shape", [(1,), ()], ids=str)
def test_takes_a_head_of_either_shape(shape, bias_shape):
    states, labels = torch.randn(2, 3, 3), torch.tensor([[1, 2], [1, -100]])
    linear = torch.nn.Linear(3, 1)
    expected = linear(torch.stack((states[0, 2], states[1, 1]))).squeeze(1)
    found = sequence_rewards(
        states, labels, linear.weight.reshape(shape), linear.bias.reshape(bias_shape)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    states = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, 3], [1, -100, -100], [-100, 2, 3], [-100, 1, -100]])
    weight = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *leaves: sequence_rewards(leaves[0], labels, *leaves[1:]), (states, weight, bias)
    )
