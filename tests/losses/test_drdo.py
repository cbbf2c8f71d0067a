from __future__ import annotations

import math
from typing import Any

import formulas
import pytest
import torch
from batches import (
    DTYPES,
    Batch,
    batches,
    hold_difference,
    hold_equal,
    hold_to_reference,
    some_of,
)
from closeness import assert_no_worse
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import Head, drdo_loss
from fastpref.losses.drdo import DRDOOutput, log1mexp

LABELS = torch.tensor([[-100, 3, 0, 4], [2, -100, 1, -100], [-100, 6, 5, 2], [1, 2, 3, -100]])
OPTIONS = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([0.1, 0.0, 1]),
        "gamma": st.sampled_from([2.0, 0.0, 1, 3.5]),
        "length_normalize": st.booleans(),
        "detach_focal": st.booleans(),
    }
)
COST = st.fixed_dictionaries(
    {"compact": st.booleans(), "scratch_bytes": st.sampled_from([0, 200, 10**6])}
)
TENSORS = ("states", "weight", "bias", "student_rewards", "oracle_rewards")


def rewards(batch: Batch) -> dict[str, Tensor]:
    rows = len(batch.labels)
    return {"student_rewards": batch.normal(rows), "oracle_rewards": batch.normal(rows)}


def padded_loss(batch: Batch, leaves: dict[str, Tensor], **options: Any) -> DRDOOutput:
    return drdo_loss(
        leaves["states"][:, :-1],
        batch.head(leaves),
        batch.labels,
        leaves["student_rewards"],
        leaves["oracle_rewards"],
        ignore_index=batch.ignore_index,
        temperature=batch.temperature,
        **options,
    )


def packed_loss(batch: Batch, leaves: dict[str, Tensor], **options: Any) -> DRDOOutput:
    return drdo_loss(
        batch.pack(leaves["states"]),
        batch.head(leaves),
        batch.packed_labels(),
        leaves["student_rewards"],
        leaves["oracle_rewards"],
        ignore_index=batch.ignore_index,
        cu_seqlens=batch.cu_seqlens(),
        temperature=batch.temperature,
        **options,
    )


def reference_logps(batch: Batch, leaves: dict[str, Tensor]) -> Tensor:
    return formulas.linear_logps(
        leaves["states"][:, :-1],
        batch.head(leaves),
        batch.labels,
        ignore_index=batch.ignore_index,
        temperature=batch.temperature,
    )


def reference_loss(batch: Batch, leaves: dict[str, Tensor], **options: Any) -> Tensor:
    return formulas.drdo_loss(
        leaves["states"][:, :-1],
        batch.head(leaves),
        batch.labels,
        leaves["student_rewards"],
        leaves["oracle_rewards"],
        ignore_index=batch.ignore_index,
        temperature=batch.temperature,
        **options,
    )


def the_naive_formula_holds(batch: Batch, options: dict[str, Any]) -> bool:
    """Whether ``log(1 - exp(z))`` and ``1 - sigmoid(z)`` keep their digits in float64."""
    sums = batch.logps().sum(1)
    z = sums / batch.mask.sum(1) if options["length_normalize"] else sums
    chosen, rejected = z.chunk(2)
    return bool((rejected < -0.1).all() and (chosen - rejected < 8).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    batch=batches(min_vocab=2, min_labels=1), options=OPTIONS, cost=COST, trains=some_of(*TENSORS)
)
def test_equals_the_reference(dtype, batch, options, cost, trains):
    assume(the_naive_formula_holds(batch, options))
    more = rewards(batch)
    hold_to_reference(
        lambda leaves: padded_loss(batch, leaves, **options, **cost).loss,
        lambda leaves: reference_loss(batch, leaves, **options),
        lambda dtype: batch.leaves(dtype, trains, **more),
        dtype,
        scale=options["alpha"] * batch.largest_sum(),
        sharpness=options["gamma"] * batch.largest_sum(),
    )


@given(batch=batches(), options=OPTIONS, cost=COST, trains=some_of(*TENSORS))
def test_packed_equals_padded(batch, options, cost, trains):
    more = rewards(batch)

    def results(function: Any) -> dict[str, Tensor]:
        leaves = batch.leaves(torch.float64, trains, **more)
        found = function(batch, leaves, **options, **cost)
        if found.loss.requires_grad:
            found.loss.backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {**{name: one.detach() for name, one in found._asdict().items()}, **gradients}

    hold_equal(results(packed_loss), results(padded_loss))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(batch=batches(), options=OPTIONS)
def test_metrics_are_the_terms_of_the_loss(dtype, batch, options):
    more = rewards(batch)
    exact, plain, ours = (
        batch.leaves(one, {"states", "student_rewards"}, **more)
        for one in (torch.float64, dtype, dtype)
    )
    found = padded_loss(batch, ours, **options)
    assert not any(values.requires_grad for values in found[1:])
    expected, rough = (reference_logps(batch, one).sum(1).detach() for one in (exact, plain))
    pairs = len(expected) // 2
    assert_no_worse(found.chosen_logps, rough[:pairs], expected[:pairs], dtype)
    assert_no_worse(found.rejected_logps, rough[pairs:], expected[pairs:], dtype)
    assert torch.equal(found.chosen_rewards, ours["student_rewards"][:pairs])
    assert torch.equal(found.rejected_rewards, ours["student_rewards"][pairs:])
    gaps = (more["oracle_rewards"] - more["student_rewards"]).unflatten(0, (2, pairs))
    squares = (gaps[0] - gaps[1]).square().mean()
    assert_no_worse(found.reward_loss, squares.to(dtype), squares, dtype)
    total = found.reward_loss + found.preference_loss
    torch.testing.assert_close(total, found.loss.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [0.0, 3000.0])
@pytest.mark.parametrize("length_normalize", [False, True])
def test_large_rewards_do_not_swallow_the_preference_loss(dtype, gap, length_normalize):
    hidden, weight = torch.randn(4, 4, 8, dtype=dtype), torch.randn(9, 8, dtype=dtype)
    rewards = torch.tensor([gap, gap, -gap, -gap], dtype=dtype)
    options = {"alpha": 0.3, "gamma": 1.5, "length_normalize": length_normalize}
    found = drdo_loss(hidden, weight, LABELS, rewards, -rewards, **options)
    assert found.reward_loss == (4 * gap) ** 2
    exact, plain = (
        formulas.drdo_loss(
            hidden.to(dtype), weight.to(dtype), LABELS, *torch.zeros(2, 4, dtype=dtype), **options
        )
        for dtype in (torch.float64, dtype)
    )
    scale = options["alpha"] * float(found.chosen_logps.abs().max())
    hold_difference(found.preference_loss, plain, exact, dtype, scale)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("length_normalize", [False, True])
def test_gradcheck(trained, packed, length_normalize):
    hidden = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=trained)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=trained)
    student = torch.randn(4, dtype=torch.float64, requires_grad=True)
    oracle = torch.randn(4, dtype=torch.float64, requires_grad=trained)
    labels, cu_seqlens = LABELS, None
    if packed:
        labels, cu_seqlens = LABELS.masked_fill(torch.arange(4) == 3, -100), torch.arange(5) * 4

    def loss(hidden, weight, bias, student, oracle):
        return drdo_loss(
            hidden.reshape(-1, 3) if packed else hidden,
            Head(weight, bias, softcap=4.0),
            labels.reshape(-1) if packed else labels,
            student,
            oracle,
            alpha=0.6,
            gamma=1.5,
            length_normalize=length_normalize,
            cu_seqlens=cu_seqlens,
            temperature=1.3,
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias, student, oracle))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("logp", [0.0, -0.0, -1e-30, -1e-9, -0.5, -math.log(2), -50.0, -1e30])
def test_log1mexp_is_finite_and_exact(dtype, logp):
    logps = torch.tensor(logp, dtype=dtype, requires_grad=True)
    found = log1mexp(logps)
    (gradient,) = torch.autograd.grad(found, logps)
    assert found.isfinite() and gradient.isfinite()

    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    at = float(logps.detach())
    counted = min(at, -tiny)  # nearer to a certainty counts as that near
    expected = math.log(-math.expm1(counted)) if counted > -1 else math.log1p(-math.exp(counted))
    torch.testing.assert_close(found.item(), expected, rtol=4 * eps, atol=0)
    slope = math.exp(counted) / math.expm1(counted) if at == counted else 0.0
    torch.testing.assert_close(gradient.item(), slope, rtol=4 * eps, atol=0)


def test_log1mexp_gradcheck():
    logps = torch.tensor([-1e-3, -0.1, -0.6, -0.8, -5.0, -30.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(log1mexp, logps.requires_grad_(), eps=1e-8, rtol=1e-4)


CERTAIN = {
    "one token": ([[0.5]], None, [[0], [0]]),
    "a dominating bias": ([[0.5], [0.2], [0.1]], [0.0, 0.0, 1000.0], [[1], [2]]),
    "no label": ([[0.5], [0.2], [0.1]], None, [[1], [-100]]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CERTAIN)
@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_certain_rejected_response_is_finite(dtype, case, length_normalize, trained):
    rows, offsets, tokens = CERTAIN[case]
    weight = torch.tensor(rows, dtype=dtype, requires_grad=trained)
    bias = None if offsets is None else torch.tensor(offsets, dtype=dtype, requires_grad=trained)
    hidden = torch.ones(2, 1, 1, dtype=dtype, requires_grad=True)
    student = torch.zeros(2, requires_grad=True)
    found = drdo_loss(
        hidden, Head(weight, bias), torch.tensor(tokens), student, torch.tensor([1.0, -1.0]),
        length_normalize=length_normalize,
    )  # fmt: skip
    assert found.rejected_logps == 0
    found.loss.backward()
    assert found.loss.isfinite()
    for leaf in (hidden, student, weight, bias):
        if leaf is not None and leaf.requires_grad:
            assert leaf.grad.isfinite().all()
    assert student.grad.tolist() == [-4.0, 4.0]
    if case == "no label":
        assert hidden.grad[0] != 0 and hidden.grad[1] == 0


def test_what_the_formula_says_of_one_token():
    # Two tokens, logits log 3 and 0: p = 3/4 for the chosen token, 1/4 for the rejected one.
    hidden = torch.ones(2, 1, 1, dtype=torch.float64)
    weight = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64)
    student = torch.tensor([0.5, 0.0], dtype=torch.float64)
    oracle = torch.tensor([2.0, -1.0], dtype=torch.float64)
    found = drdo_loss(
        hidden, weight, torch.tensor([[0], [1]]), student, oracle, alpha=0.1, gamma=2.0
    )
    # p_w = (3/4) / (3/4 + 1/4), and the odds are (3/4) / (1 - 1/4) = 1, whose logarithm is 0.
    torch.testing.assert_close(found.loss.item(), (3 - 0.5) ** 2, rtol=1e-12, atol=0)
    swapped = drdo_loss(
        hidden, weight, torch.tensor([[1], [0]]), student, oracle, alpha=0.1, gamma=2.0
    )
    focal = 0.75**2
    expected = 2.5**2 - 0.1 * focal * math.log(0.25 / (1 - 0.75))
    torch.testing.assert_close(swapped.loss.item(), expected, rtol=1e-12, atol=0)
    same = drdo_loss(
        hidden, weight, torch.tensor([[1], [1]]), student, oracle, alpha=0.1, gamma=2.0
    )
    expected = 2.5**2 - 0.1 * 0.5**2 * math.log(0.25 / 0.75)
    torch.testing.assert_close(same.loss.item(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_row_without_labels_counts_zero(dtype, length_normalize, trained):
    # Small enough that the focal factor stays within float16.
    hidden = (torch.randn(4, 4, 8) / 8).to(dtype).requires_grad_()
    weight = torch.randn(9, 8, dtype=dtype, requires_grad=trained)
    labels = LABELS.clone()
    labels[0] = labels[3] = -100  # the chosen one of a pair, the rejected one of the other
    student, oracle = torch.zeros(4), torch.tensor([1.0, 2.0, 0.0, -1.0])
    found = drdo_loss(
        hidden, weight, labels, student, oracle, length_normalize=length_normalize, gamma=0.5
    )
    found.loss.backward()
    assert found.chosen_logps[0] == found.rejected_logps[1] == 0
    assert found.loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[0] == 0).all() and (hidden.grad[3] == 0).all()
    assert (hidden.grad[1] != 0).any() and (hidden.grad[2] != 0).any()
    if trained:
        assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_batch_without_labels_is_a_differentiable_constant(dtype, length_normalize, trained):
    hidden = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(9, 8, dtype=dtype, requires_grad=trained)
    student = torch.zeros(2, requires_grad=True)
    found = drdo_loss(
        hidden, weight, torch.full((2, 3), -100), student, torch.tensor([1.0, -1.0]),
        length_normalize=length_normalize,
    )  # fmt: skip
    found.loss.backward()
    assert found.loss.isfinite() and found.reward_loss == 4
    assert (hidden.grad == 0).all()
    assert student.grad.tolist() == [-4.0, 4.0]
    if trained:
        assert (weight.grad == 0).all()


def test_detach_focal_only_changes_gradients():
    hidden = torch.randn(2, 3, 8, dtype=torch.float64)
    weight = torch.randn(9, 8, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
    results = []
    for detach_focal in (False, True):
        leaf = hidden.clone().requires_grad_()
        loss = drdo_loss(
            leaf, weight, labels, torch.zeros(2), torch.zeros(2),
            length_normalize=True, detach_focal=detach_focal,
        ).loss  # fmt: skip
        loss.backward()
        results.append((loss.item(), leaf.grad))
    assert results[0][0] == results[1][0]
    assert not torch.allclose(results[0][1], results[1][1])


def test_compiles_without_graph_breaks():
    hidden, student = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, requires_grad=True)
    weight, labels = torch.randn(20, 8), torch.tensor([[4, 9, 2], [1, -100, 3]])

    def outputs(alpha: float) -> DRDOOutput:
        return drdo_loss(
            hidden, weight, labels, student, torch.tensor([1.0, -1.0]),
            alpha=alpha, length_normalize=True,
        )  # fmt: skip

    compiled = torch.compile(outputs, fullgraph=True)
    expected, found = outputs(0.3), compiled(0.3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(one.loss, [hidden, student]) for one in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
