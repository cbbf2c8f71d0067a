"""Sums over responses, against loops; what they weigh, and what they leave out."""

from __future__ import annotations

import math

import pytest
import torch
from batches import DTYPES, Batch, batches, hold_equal, hold_to_reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import Responses, sum_responses


def looped(logps: Tensor, weights: Tensor | None, batch: Batch) -> Tensor:
    sums = []
    for row, mask in enumerate(batch.mask):
        kept = logps[row][mask]
        sums.append((kept if weights is None else kept * weights[row][mask]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=batches(), weighted=st.booleans())
def test_equals_a_loop(dtype, batch, weighted):
    more = {"logps": batch.normal(*batch.labels.shape)}
    if weighted:
        more["weights"] = batch.normal(*batch.labels.shape)

    def ours(leaves: dict[str, Tensor]) -> Tensor:
        return sum_responses(
            leaves["logps"],
            batch.labels,
            token_weights=leaves.get("weights"),
            ignore_index=batch.ignore_index,
        ).logps

    hold_to_reference(
        ours,
        lambda leaves: looped(leaves["logps"], leaves.get("weights"), batch),
        lambda dtype: batch.leaves(dtype, {"logps", "weights"} & set(more), **more),
        dtype,
        scale=float(more["logps"].abs().sum(1).max()),
    )


@given(batch=batches(), weighted=st.booleans(), compact=st.booleans())
def test_packed_equals_padded(batch, weighted, compact):
    logps, weights = (batch.normal(*batch.labels.shape) for _ in range(2))

    def sums(packed: bool) -> dict[str, Tensor]:
        def laid_out(values: Tensor) -> Tensor:
            # What lies beyond the labels is never read.
            return batch.pack(torch.nn.functional.pad(values, (0, 1), value=math.nan))

        found = sum_responses(
            laid_out(logps) if packed else logps,
            batch.packed_labels() if packed else batch.labels,
            cu_seqlens=batch.cu_seqlens() if packed else None,
            token_weights=None if not weighted else laid_out(weights) if packed else weights,
            ignore_index=batch.ignore_index,
            compact=compact,
        )
        return {name: values for name, values in found._asdict().items() if values is not None}

    hold_equal(sums(True), sums(False))


def test_weights_leave_likelihood_and_lengths_alone():
    labels = torch.tensor([[4, 9, 2], [1, 3, -100]])
    logps, weights = torch.full((2, 3), -0.5), torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 9.0]])
    found = sum_responses(logps, labels, token_weights=weights)
    assert found.logps.tolist() == [-2.0, -2.0]
    assert found.likelihoods().tolist() == [-1.5, -1.0]
    assert found.lengths.tolist() == [3, 2]
    assert found.per_token(found.likelihoods()).tolist() == [-0.5, -0.5]
    assert found.chosen_nll() == 0.5


def test_a_response_without_labels_counts_zero():
    logps = torch.full((2, 2), math.nan, requires_grad=True)
    found = sum_responses(logps, torch.full((2, 2), -100))
    assert found.logps.tolist() == [0.0, 0.0] and found.lengths.tolist() == [0, 0]
    assert found.per_token(found.logps).tolist() == [0.0, 0.0] and found.chosen_nll() == 0
    found.logps.sum().backward()
    assert (logps.grad == 0).all()


def test_gradcheck():
    labels = torch.tensor([[4, 9, 2], [1, -100, 3]])
    leaves = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def sums(logps: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        found = sum_responses(logps, labels, token_weights=weights)
        return found.logps, found.likelihoods()

    assert torch.autograd.gradcheck(sums, leaves)


def test_compiles_without_graph_breaks():
    labels, boundaries = torch.tensor([4, 9, -100, 3, -100]), torch.tensor([0, 3, 5])

    def sums(logps: Tensor) -> Responses:
        return sum_responses(logps, labels, cu_seqlens=boundaries)

    logps = -torch.rand(5)
    expected, found = sums(logps), torch.compile(sums, fullgraph=True)(logps)
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other)
