from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Case, cases, reference_logps, reference_logsumexp
from closeness import assert_no_worse
from hypothesis import given
from hypothesis import strategies as st

import fastpref
from fastpref import Head
from fastpref.ops import tiling


def run(case: Case, function=fastpref.linear_logps, **more: object):
    return function(case.hidden, case.head, case.labels, **case.options, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    case=cases(),
    trained=st.booleans(),
    compact=st.booleans(),
    scratch_bytes=st.sampled_from([0, 4000, 10**7]),
)
def test_equals_the_reference(dtype, case, trained, compact, scratch_bytes):
    exact, plain, ours = (
        case.to(torch.float64, trained=trained)
        if kind == "exact"
        else case.to(dtype, trained=trained)
        for kind in ("exact", "plain", "ours")
    )
    # Rounding the inputs is not an error of the computation.
    exact = ours.to(torch.float64, trained=trained)
    expected, rough = reference_logps(exact), reference_logps(plain)
    found = run(ours, compact=compact, scratch_bytes=scratch_bytes)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_no_worse(found, rough, expected, dtype)
    assert (found[case.labels == case.options["ignore_index"]] == 0).all()

    incoming = torch.randn(found.shape, dtype=torch.float64)
    for values in (expected, rough, found):
        values.backward(incoming.to(values.dtype))
    for gradient, rough_gradient, exact_gradient in zip(
        ours.gradients(), plain.gradients(), exact.gradients(), strict=True
    ):
        assert gradient.dtype == dtype
        assert_no_worse(gradient, rough_gradient, exact_gradient, dtype)


@pytest.mark.parametrize("trained", [False, True])
@given(case=cases())
def test_returns_a_differentiable_lse(trained, case):
    exact, plain, ours = (
        case.to(dtype, trained=trained) for dtype in (torch.float64, torch.float32, torch.float32)
    )
    valid = case.labels != case.options["ignore_index"]
    logps, lse, *_ = run(ours, fastpref.linear_logps_with_stats)
    expected = [(reference_logps(one), reference_logsumexp(one) * valid) for one in (exact, plain)]
    assert_no_worse(lse, expected[1][1], expected[0][1], torch.float32)
    weights = torch.randn(2, *lse.shape)
    for one in (*expected, (logps, lse)):
        sum((w * values).sum() for w, values in zip(weights, one, strict=True)).backward()
    for found in zip(ours.gradients(), plain.gradients(), exact.gradients(), strict=True):
        assert_no_worse(*found, torch.float32)


@given(case=cases(), trained=st.booleans(), scratch_bytes=st.sampled_from([0, 3000, 20000, 10**7]))
def test_is_the_same_for_any_tiling(case, trained, scratch_bytes):
    def logps_and_gradients() -> list[torch.Tensor]:
        leaves = case.to(torch.float64, trained=trained)
        logps = run(leaves, scratch_bytes=scratch_bytes)
        logps.sum().backward()
        return [logps.detach(), *leaves.gradients()]

    whole = logps_and_gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "ROWS_PER_TILE", 4)
        patch.setattr(tiling, "CPU_TILE_BYTES", 1)
        patch.setattr(tiling, "COLUMN_MULTIPLE", 16)
        tiled = logps_and_gradients()
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("trained", "scratch_bytes"), [(False, 0), (True, 0), (True, 10**6)])
def test_certain_tokens_keep_their_digits(trained, scratch_bytes):
    """p(label) is 1 - 1e-9 and less: float32 logits lose it, the gradient and log-prob do not."""
    weight = torch.eye(4, requires_grad=trained)
    hidden = torch.tensor([[22.0, 0, 0, 0], [40.0, 0, 0, 0]], requires_grad=True)
    labels = torch.zeros(2, dtype=torch.int64)
    logps = fastpref.linear_logps(hidden, weight, labels, scratch_bytes=scratch_bytes)
    exact = -torch.log1p(3 * torch.exp(-hidden.detach().double()[:, 0]))
    torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=0)
    logps.sum().backward()
    torch.testing.assert_close(hidden.grad[:, 0].double(), -exact, rtol=1e-5, atol=0)


def test_masked_vocabulary_counts_for_nothing():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(10, 8)
    bias = torch.zeros(10).index_fill_(0, torch.tensor([0, 1, 2, 8, 9]), -torch.inf)
    labels = torch.tensor([3, 5, 7])
    found = fastpref.linear_logps(hidden, Head(weight, bias), labels)
    expected = reference_logps(Case(hidden, Head(weight[3:8]), labels - 3))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("trained", [False, True])
def test_all_ignored_gives_a_differentiable_zero(trained):
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=trained)
    logps = fastpref.linear_logps(hidden, weight, torch.full((4,), -100))
    assert (logps == 0).all()
    logps.sum().backward()
    assert (hidden.grad == 0).all()
    assert weight.grad is None or (weight.grad == 0).all()


def test_without_compaction_a_bad_label_is_nan_and_the_rest_is_right():
    hidden, weight = torch.randn(3, 8), torch.randn(10, 8)
    labels = torch.tensor([3, 10, -100])
    logps = fastpref.linear_logps(hidden, weight, labels, compact=False)
    assert torch.isnan(logps[1])
    expected = fastpref.linear_logps(hidden[:1], weight, labels[:1])
    torch.testing.assert_close(logps[0], expected[0])
    assert logps[2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize(("trained", "scratch_bytes"), [(False, 0), (True, 0), (True, 10**6)])
def test_without_compaction_large_logits_of_ignored_rows_stay_out(
    dtype, scale, softcap, ignore_index, trained, scratch_bytes
):
    hidden, weight = torch.randn(6, 8), torch.randn(50, 8)
    labels = torch.tensor([3, 7, ignore_index, 9, ignore_index, 1])
    hidden[labels == ignore_index] *= scale
    case = Case(hidden, Head(weight, softcap=softcap), labels, {"ignore_index": ignore_index})

    def gradients(case: Case, **more: object) -> list[torch.Tensor]:
        logps, lse, *_ = run(case, fastpref.linear_logps_with_stats, **more)
        (logps.sum() + lse.square().sum()).backward()
        return case.gradients()

    ours, compacted = (case.to(dtype, trained=trained) for _ in range(2))
    exact = gradients(ours.to(torch.float64, trained=trained))
    found = gradients(ours, compact=False, scratch_bytes=scratch_bytes)
    for one in zip(found, gradients(compacted), exact, strict=True):
        assert_no_worse(*one, dtype)


def plain_logps(case: Case) -> torch.Tensor:
    """As a model computes them: logits in its dtype, their log-softmax in float32."""
    logits = (case.hidden @ case.head.weight.T).float() / case.options.get("temperature", 1.0)
    return logits.log_softmax(-1).gather(-1, case.labels.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("confidence", [2.0, 8.0, 16.0, 20.0, 24.0])
def test_float16_keeps_the_gradients_that_a_loss_scale_lifts(confidence, trained):
    """Of a token with 1 - p = 1e-6 the Jacobian is below float16's smallest number."""
    weight = (0.05 * torch.randn(500, 64)).half()
    labels = torch.randint(0, 500, (64,))
    own = weight[labels].float()
    hidden = (confidence * own / own.square().sum(-1, keepdim=True)).half()
    case = Case(hidden, Head(weight), labels)
    ours, plain = (case.to(torch.float16, trained=trained) for _ in range(2))
    exact = case.to(torch.float64, trained=trained)
    loss_scale = 65536.0
    for one, logps in ((ours, run(ours)), (plain, plain_logps(plain))):
        (-loss_scale * logps.mean()).backward()
        assert all(gradient.isfinite().all() for gradient in one.gradients())
    (-loss_scale * reference_logps(exact).mean()).backward()
    for one in zip(ours.gradients(), plain.gradients(), exact.gradients(), strict=True):
        assert_no_worse(*one, torch.float16)


@pytest.mark.parametrize("trained", [False, True])
def test_float16_takes_a_small_temperature(trained):
    """The Jacobian, of the size of weight / temperature, is beyond float16's largest number."""
    hidden, weight = torch.randn(6, 8) / 100, 10 * torch.randn(50, 8)
    case = Case(hidden, Head(weight), torch.randint(0, 50, (6,)), {"temperature": 1e-4})
    ours = case.to(torch.float16, trained=trained)
    exact = ours.to(torch.float64, trained=trained)
    for logps in (run(ours), reference_logps(exact)):
        (1e-6 * logps.sum()).backward()
    for found, expected in zip(ours.gradients(), exact.gradients(), strict=True):
        assert_no_worse(found, expected.half(), expected, torch.float16)


def test_no_rows_at_all():
    hidden = torch.randn(0, 8, requires_grad=True)
    logps = fastpref.linear_logps(hidden, torch.randn(5, 8), torch.zeros(0, dtype=torch.int64))
    assert logps.shape == (0,)
    logps.sum().backward()
