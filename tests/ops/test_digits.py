"""No digit is lost where full logits lose none, and nothing spoils what it has no part in."""

from __future__ import annotations

import pytest
import torch
from cases import Case, reference_logps, reference_logsumexp
from closeness import assert_no_worse
from hypothesis import given
from hypothesis import strategies as st

import fastpref
from fastpref import Head, linear_logps, linear_logps_with_stats

VOCAB, WIDTH, ROWS = 600, 16, 24
SCRATCH = [0, 10**7]
KINDS = [(False, 0), (True, 0), (True, 10**7)]  # whether the head trains, scratch_bytes


def case_with(offset: float = 0.0, scale: float = 3.0, softcap: float | None = None) -> Case:
    hidden = scale * torch.randn(ROWS, WIDTH) / WIDTH**0.5
    head = Head(torch.randn(VOCAB, WIDTH), torch.full((VOCAB,), offset), softcap=softcap)
    return Case(hidden, head, torch.randint(0, VOCAB, (ROWS,)))


def relative_errors(case: Case, loss, **options) -> list[tuple[float, float]]:
    """Of each gradient: fastpref's error, and that of full logits in float32."""
    trained = options.pop("trained", True)
    ours, plain = (case.to(torch.float32, trained=trained) for _ in range(2))
    exact = case.to(torch.float64, trained=trained)
    found = linear_logps_with_stats(ours.hidden, ours.head, ours.labels, **options)
    loss(found.logps, found.lse).backward()
    for one in (plain, exact):
        loss(reference_logps(one), reference_logsumexp(one)).backward()
    gradients = zip(ours.gradients(), plain.gradients(), exact.gradients(), strict=True)
    return [
        tuple(float((one.double() - right).norm() / right.norm()) for one in (found, rough))
        for found, rough, right in gradients
    ]


LOSSES = {
    "log-probabilities": lambda logps, lse: (logps * torch.linspace(-1, 1, ROWS)).sum(),
    "logsumexp": lambda logps, lse: (lse * torch.linspace(-1, 1, ROWS)).sum(),
    "both": lambda logps, lse: (logps * torch.linspace(-1, 1, ROWS)).sum() + lse.sum(),
}


@pytest.mark.parametrize("offset", [10.0, 100.0, 300.0, -300.0])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("trained", "scratch_bytes"), KINDS)
def test_an_offset_of_all_logits_costs_no_more_than_in_full_logits(
    trained, scratch_bytes, loss, offset
):
    options = {"trained": trained, "scratch_bytes": scratch_bytes}
    for error, of_full_logits in relative_errors(case_with(offset), LOSSES[loss], **options):
        assert error <= 1.2 * of_full_logits + 2e-7


@pytest.mark.parametrize("scratch_bytes", SCRATCH)
def test_equal_logits_of_any_size_have_no_gradient(scratch_bytes):
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.full((2, 1), 1e3, requires_grad=True)
    linear_logps(hidden, weight, torch.tensor([0]), scratch_bytes=scratch_bytes).sum().backward()
    assert hidden.grad.item() == 0
    assert weight.grad.tolist() == [[0.5], [-0.5]]


@pytest.mark.parametrize("scratch_bytes", SCRATCH)
@pytest.mark.parametrize("softcap", [2.0, 5.0, 30.0])
def test_a_soft_cap_costs_no_more_than_in_full_logits(softcap, scratch_bytes):
    """The label's slope comes from its logit, not from a sum that has rounded it away."""
    case = case_with(scale=6.0, softcap=softcap)
    errors = relative_errors(case, LOSSES["log-probabilities"], scratch_bytes=scratch_bytes)
    for error, of_full_logits in errors:
        assert error <= 1.2 * of_full_logits + 1e-7


@pytest.mark.parametrize(("trained", "scratch_bytes"), KINDS)
def test_who_writes_into_the_log_probabilities_spoils_no_gradient(trained, scratch_bytes):
    case = case_with().to(torch.float32, trained=trained)
    mask = torch.arange(ROWS) % 3 > 0

    def gradients(masked) -> list[torch.Tensor]:
        found = linear_logps_with_stats(
            case.hidden, case.head, case.labels, scratch_bytes=scratch_bytes
        )
        leaves = [one for one in (case.hidden, *case.head[:2]) if one.requires_grad]
        return torch.autograd.grad(masked(found.logps, found.lse), leaves)

    def in_place(logps, lse):
        logps[~mask] = 0
        lse[~mask] = 0
        return logps.square().sum() + lse.sum()

    expected = gradients(lambda logps, lse: (logps.square() + lse)[mask].sum())
    for one, other in zip(gradients(in_place), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("trained", "scratch_bytes"), KINDS)
def test_an_ignored_row_of_anything_reaches_no_gradient(trained, scratch_bytes, spoiled):
    case = case_with()
    case.labels[::4] = -100
    clean, dirty = (case.to(torch.float32, trained=trained) for _ in range(2))
    with torch.no_grad():
        dirty.hidden[::4] = spoiled
    for one in (clean, dirty):
        found = linear_logps_with_stats(
            one.hidden, one.head, one.labels, compact=False, scratch_bytes=scratch_bytes
        )
        (found.logps.sum() + found.lse.sum() + found.entropy.sum()).backward()
        assert found.logps.isfinite().all() and found.entropy.isfinite().all()
    for one, other in zip(clean.gradients(), dirty.gradients(), strict=True):
        assert torch.equal(one, other)


# Triton's interpreter computes in numpy, which warns of inf - inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
@pytest.mark.parametrize("at", ["label", "another"])
@pytest.mark.parametrize(("trained", "scratch_bytes"), KINDS)
def test_an_infinite_logit_is_nan_as_in_full_logits(trained, scratch_bytes, at):
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.zeros(5, 1)
    weight[1 if at == "label" else 2] = torch.inf
    weight.requires_grad_(trained)
    label = torch.tensor([1])
    assert (hidden @ weight.T).log_softmax(-1)[0, 1].isnan() or at == "another"
    assert linear_logps(hidden, weight, label, scratch_bytes=scratch_bytes).isnan().all()
    with torch.no_grad():
        assert linear_logps(hidden, weight, label).isnan().all()


def test_a_nearly_certain_rejected_token_keeps_its_gradient():
    """DRDO divides by 1 - p of it, which is 1e-8; so far from certain it is still told apart."""
    shift = 18.42  # log(1e8)
    hidden = torch.tensor([[[1.0]], [[1.0]]], requires_grad=True)
    weight = torch.tensor([[shift], [0.0]])
    exact = torch.tensor([[[1.0]], [[1.0]]], dtype=torch.float64, requires_grad=True)
    rewards = torch.zeros(2)
    for one, dtype in ((hidden, torch.float32), (exact, torch.float64)):
        labels = torch.tensor([[1], [0]])
        fastpref.drdo_loss(one, weight.to(dtype), labels, rewards, rewards).loss.backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=0)
    assert exact.grad[1].abs() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("trained", "scratch_bytes"), KINDS)
def test_a_16_bit_gradient_is_rounded_once(dtype, trained, scratch_bytes):
    case = case_with().to(dtype, trained=trained)
    exact = case.to(torch.float64, trained=trained)
    weights = torch.linspace(-1, 1, ROWS).double()
    logps = linear_logps(case.hidden, case.head, case.labels, scratch_bytes=scratch_bytes)
    (logps * weights).sum().backward()
    (reference_logps(exact) * weights).sum().backward()
    for found, right in zip(case.gradients(), exact.gradients(), strict=True):
        once = (right.to(dtype).double() - right).norm()
        assert (found.double() - right).norm() <= 1.05 * once


@given(offset=st.sampled_from([0.0, 30.0, 300.0]), scale=st.sampled_from([0.01, 1.0, 20.0]))
def test_log_probabilities_are_as_exact_as_log_softmax(offset, scale):
    case = case_with(offset, scale)
    exact, plain = (case.to(dtype, trained=False) for dtype in (torch.float64, torch.float32))
    found = linear_logps(plain.hidden, plain.head, plain.labels)
    rough, right = reference_logps(plain), reference_logps(exact)
    assert (found.double() - right).norm() <= 1.2 * (rough.double() - right).norm()
    assert_no_worse(found, rough, right, torch.float32)


@pytest.mark.parametrize("scratch_bytes", SCRATCH)
def test_a_small_sum_is_not_rounded_with_its_label(scratch_bytes):
    """The label's row of the head is most of a flat distribution's gradient."""
    hidden, weight = 0.01 * torch.randn(ROWS, WIDTH), torch.randn(20 * VOCAB, WIDTH)
    labels = torch.randint(0, len(weight), (ROWS,))
    gradients = []
    for dtype, trained in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        one = Case(hidden, Head(weight), labels).to(dtype, trained=trained)
        linear_logps(
            one.hidden, one.head, labels, scratch_bytes=scratch_bytes if trained else None
        ).sum().backward()
        gradients.append(one.hidden.grad.double())
    error, of_frozen = ((one - gradients[-1]).norm() for one in gradients[:2])
    assert error <= 1.5 * of_frozen
