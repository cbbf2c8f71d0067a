"""No digit of a divergence is lost that logits have; nothing spoils what it has no part in."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from closeness import assert_no_worse
from two_heads import EVERY, TwoHeads

from fastpref import Head
from fastpref.ops import linear_divergence, linear_divergence_with_stats
from fastpref.ops.divergences import KINDS

VOCAB, WIDTH, ROWS = 600, 16, 24
UNSIGNED = [name for name in EVERY if not name.startswith("advantage")]
PATHS = [(False, 0), (True, 0), (True, 10**7)]  # whether the head trains, scratch_bytes


def case_with(distance: float, offset: float = 0.0, scale: float = 3.0) -> TwoHeads:
    """A teacher so far from its student; the logits of both share an offset."""

    def offsets() -> torch.Tensor:
        return torch.full((VOCAB,), offset)

    hidden = scale * torch.randn(ROWS, WIDTH) / WIDTH**0.5
    head = Head(torch.randn(VOCAB, WIDTH), offsets())
    near = [hidden * (1 + distance * torch.randn(hidden.shape)) for _ in range(2)]
    student = Case(hidden, head, torch.randint(0, VOCAB, (ROWS,)), {"ignore_index": -100})
    return TwoHeads(student, *((one, head) for one in near), None)


def of_logits(
    student: list[list[float]], teacher: list[list[float]], kind: str, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergences of given logits and their gradients: the heads are the identity."""
    logits = torch.tensor(student, requires_grad=True)
    eye, labels = torch.eye(logits.shape[1]), torch.zeros(len(logits), dtype=torch.int64)
    if kind == "advantage":
        options |= {"reference_hidden": torch.zeros_like(logits.detach()), "reference_head": eye}
    found = linear_divergence(logits, eye, torch.tensor(teacher), eye, labels, kind=kind, **options)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    return found.detach(), gradient


@pytest.mark.parametrize("name", UNSIGNED)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_small_divergences_keep_their_digits(distance, name):
    """What is left is the rounding of the logits themselves, relative to their difference."""
    case = case_with(distance).to(torch.float32, trained=False)
    exact = case.to(torch.float64, trained=False)
    found, expected = case.run(name), exact.expected(name)
    relative = (found.double() / expected - 1).detach().abs().max()
    assert relative <= 3e-6 / distance
    found.sum().backward()
    expected.sum().backward()
    gradient, right = case.student.hidden.grad, exact.student.hidden.grad
    if name != "total_variation":  # whose sign is rounding's
        assert (gradient.double() - right).norm() <= 3e-6 / distance * right.norm()


def test_plain_pytorch_has_lost_them():
    """So the test above says something."""
    case = case_with(1e-3)
    rough, exact = (
        case.to(dtype, trained=False).expected("forward_kl")
        for dtype in (torch.float32, torch.float64)
    )
    assert (rough.double() / exact - 1).abs().max() > 0.05


@pytest.mark.parametrize("name", UNSIGNED)
def test_equal_models_have_no_divergence_and_no_gradient(name):
    case = case_with(0.0, offset=100.0).to(torch.float32, trained=False)
    found = case.run(name)
    assert (found == 0).all()
    found.sum().backward()
    assert (case.student.hidden.grad == 0).all()


@pytest.mark.parametrize("name", UNSIGNED)
@pytest.mark.parametrize("distance", [1e-5, 1e-3, 1.0])
def test_no_rounding_makes_a_divergence_negative(distance, name):
    case = case_with(distance, offset=300.0).to(torch.float32, trained=False)
    assert (case.run(name) >= 0).all()


@pytest.mark.parametrize("offset", [100.0, -300.0])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("trained", "scratch_bytes"), PATHS)
def test_an_offset_of_all_logits_costs_no_more_than_in_full_logits(
    trained, scratch_bytes, name, offset
):
    case = case_with(0.3, offset)
    ours, plain = (case.to(torch.float32, trained=trained) for _ in range(2))
    exact = case.to(torch.float64, trained=trained)
    values = ours.run(name, scratch_bytes=scratch_bytes), plain.expected(name), exact.expected(name)
    assert_no_worse(*(one.detach() for one in values), torch.float32)
    if name == "total_variation":
        return
    weights = torch.linspace(-1, 1, ROWS)
    for one in values:
        (one * weights).sum().backward()
    cases = (ours, plain, exact)
    for gradients in zip(*(one.student.gradients() for one in cases), strict=True):
        assert_no_worse(*gradients, torch.float32)


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_certain_models_keep_their_digits(gap):
    """Both put all but exp(-gap) on one token, the teacher a little less: what is left decides."""
    student, teacher = [[gap, 0.0, 0.0]], [[gap, 1.0, 0.0]]
    exact = [torch.tensor(one, dtype=torch.float64) for one in (student, teacher)]
    others = [one[0, 1:].exp().sum() * torch.exp(-one[0, 0]) for one in exact]
    below = others[0].log1p() - others[1].log1p()
    d, q = (exact[1] - exact[0])[0] + below, (exact[0][0] - gap).exp() / (1 + others[0])
    forward = (q * (d * d.exp() - d.expm1())).sum()
    reverse = (q * (d.expm1() - d)).sum()
    for kind, value in (("forward_kl", forward), ("reverse_kl", reverse)):
        found, gradient = of_logits(student, teacher, kind)
        torch.testing.assert_close(found[0].double(), value, rtol=2e-6, atol=0)
        # The top's is what the others' sum up to, 1e-9 and less, and no rounding of 1 - 1.
        torch.testing.assert_close(gradient[0, 0], -gradient[0, 1:].sum(), rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient[0].double(), q * (-d - reverse), rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("gap", [50.0, 200.0, 3000.0])
def test_disjoint_models(gap):
    """Each gives the other's token a probability below float32's range."""
    student, teacher = [[gap, 0.0, 0.0]], [[0.0, gap, 0.0]]
    values = {
        "forward_kl": gap, "reverse_kl": gap, "jsd": 0.6931472, "skew_kl": 2.3025851,
        "skew_reverse_kl": 2.3025851, "total_variation": 1.0, "jeffreys": 2 * gap,
        "advantage": 1.0986123 - gap,
    }  # fmt: skip
    assert set(values) == set(KINDS)
    for kind, value in values.items():
        found, gradient = of_logits(student, teacher, kind)
        torch.testing.assert_close(found, torch.tensor([value]), rtol=1e-6, atol=0)
        assert gradient.isfinite().all()
        if kind in ("forward_kl", "jeffreys"):
            torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0, 0.0]]))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("trained", "scratch_bytes"), PATHS)
def test_tokens_that_all_heads_mask_count_for_nothing(trained, scratch_bytes, name):
    case = case_with(0.3)
    mask = torch.arange(VOCAB) % 3 == 1

    def masked(head: Head) -> Head:
        return head._replace(bias=head.bias.masked_fill(mask, -torch.inf))

    def without(head: Head) -> Head:
        return Head(head.weight[~mask], head.bias[~mask])

    def with_heads(change) -> TwoHeads:
        models = [(hidden, change(head)) for hidden, head in (case.teacher, case.reference)]
        student = case.student._replace(
            head=change(case.student.head), labels=torch.zeros(ROWS, dtype=torch.int64)
        )
        changed = TwoHeads(student, *models, None)
        return changed.to(torch.float32, trained=trained)

    large, small = with_heads(masked), with_heads(without)
    found, expected = (
        one.run(name, linear_divergence_with_stats, scratch_bytes=scratch_bytes)
        for one in (large, small)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one in (found, expected):
        (one.divergence.sum() + one.logps.sum()).backward()
    for one, other in zip(large.student.gradients(), small.student.gradients(), strict=True):
        if len(one) == VOCAB:
            assert (one[mask] == 0).all()
            one = one[~mask]
        torch.testing.assert_close(one, other)


INFINITE = {"forward_kl": "student", "reverse_kl": "teacher", "jeffreys": "either"}


@pytest.mark.parametrize("name", UNSIGNED)
@pytest.mark.parametrize("masking", ["student", "teacher"])
def test_a_token_that_one_head_masks(masking, name):
    """Infinite where the formula is; else as if its logit were very low."""
    case = case_with(0.3)
    hidden, head = case.student[:2]

    def with_bias(value: float) -> TwoHeads:
        bias = head.bias.clone()
        bias[:10] = value
        if masking == "teacher":
            teacher = case.teacher[0], head._replace(bias=bias)
            return case._replace(teacher=teacher).to(torch.float32, trained=False)
        student = case.student._replace(head=head._replace(bias=bias))
        return case._replace(student=student).to(torch.float32, trained=False)

    masked, low = with_bias(-torch.inf), with_bias(-1e4)
    found = masked.run(name)
    if INFINITE.get(name) in (masking, "either"):
        assert (found == torch.inf).all()
    else:
        torch.testing.assert_close(found, low.run(name))
    if name == "reverse_kl" and masking == "teacher" or name == "jeffreys" and masking == "teacher":
        return  # infinite in the gradient, too
    found.sum().backward()
    low.run(name).sum().backward()
    if name == "jeffreys":
        assert masked.student.hidden.grad.isfinite().all()
    else:
        torch.testing.assert_close(masked.student.hidden.grad, low.student.hidden.grad)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("where", ["student", "teacher", "reference"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_no_number_is_said_and_stays_in_its_row(what, where, name):
    if where == "reference" and not name.startswith("advantage"):
        return
    case = case_with(0.3)
    hidden = case.student.hidden if where == "student" else getattr(case, where)[0]
    hidden[3, 5] = what
    ours = case.to(torch.float32, trained=True)
    found = ours.run(name, linear_divergence_with_stats)
    bad = torch.arange(ROWS) == 3
    assert torch.equal(found.divergence.isnan(), bad)
    if where == "student":
        assert torch.equal(found.logps.isnan(), bad) and torch.equal(found.entropy.isnan(), bad)
    found.divergence[~bad].sum().backward()
    assert ours.student.hidden.grad[~bad].isfinite().all()


def test_a_head_without_any_token_has_no_distribution():
    for masked in ("student", "teacher"):
        head, nothing = torch.randn(9, 8), torch.full((9,), -torch.inf)
        heads = {"student": head, "teacher": head, masked: Head(head, nothing)}
        labels, hidden = torch.zeros(2, dtype=torch.int64), torch.randn(2, 8)
        for kind in set(KINDS) - {"advantage"}:
            found = linear_divergence(
                hidden, heads["student"], hidden, heads["teacher"], labels, kind=kind
            )
            assert found.isnan().all(), (masked, kind)


@pytest.mark.parametrize("spoiled", [torch.nan, 1e30])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "advantage"])
@pytest.mark.parametrize(("trained", "scratch_bytes"), PATHS)
def test_an_ignored_row_of_anything_reaches_nothing(trained, scratch_bytes, name, compact, spoiled):
    case = case_with(0.3)
    case.student.labels[::4] = -100
    clean, dirty = (case.to(torch.float32, trained=trained) for _ in range(2))
    with torch.no_grad():
        for hidden in (dirty.student.hidden, dirty.teacher[0], dirty.reference[0]):
            hidden[::4] = spoiled
    found = [
        one.run(name, linear_divergence_with_stats, compact=compact, scratch_bytes=scratch_bytes)
        for one in (clean, dirty)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    for one in found:
        (one.divergence.sum() + one.logps.sum() + one.lse.sum()).backward()
    for one, other in zip(clean.student.gradients(), dirty.student.gradients(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("trained", "scratch_bytes"), PATHS)
def test_who_writes_into_the_values_spoils_no_gradient(trained, scratch_bytes):
    case = case_with(0.3).to(torch.float32, trained=trained)
    mask = torch.arange(ROWS) % 3 > 0
    leaves = [one for one in (case.student.hidden, *case.student.head[:2]) if one.requires_grad]

    def gradients(masked) -> tuple[torch.Tensor, ...]:
        found = case.run("jsd", linear_divergence_with_stats, scratch_bytes=scratch_bytes)
        return torch.autograd.grad(masked(found.divergence, found.logps), leaves)

    def in_place(divergence, logps):
        divergence[~mask] = 0
        logps[~mask] = 0
        return divergence.square().sum() + logps.sum()

    expected = gradients(lambda divergence, logps: (divergence.square() + logps)[mask].sum())
    for one, other in zip(gradients(in_place), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_without_compaction_a_bad_label_is_nan_and_the_rest_is_right():
    case = case_with(0.3)
    case.student.labels[:3] = torch.tensor([VOCAB, -100, -1])
    good = case._replace(student=case.student._replace(labels=case.student.labels.clone()))
    good.student.labels[:3] = -100
    found = case.run("jsd", linear_divergence_with_stats, compact=False)
    right = good.run("jsd", linear_divergence_with_stats)
    bad = torch.arange(ROWS) % 2 == 0
    bad[3:] = False
    for one, other in zip(found[:4], right[:4], strict=True):
        assert torch.equal(one.isnan(), bad)
        torch.testing.assert_close(one[~bad], other[~bad])
    assert torch.equal(found.is_top1, right.is_top1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("trained", [False, True])
def test_float16_keeps_the_gradients_that_a_loss_scale_lifts(trained, name):
    case = case_with(2.0**-6)
    ours, plain = (case.to(torch.float16, trained=trained) for _ in range(2))
    exact = ours.to(torch.float64, trained=trained)
    for one, values in (
        (ours, ours.run(name)), (plain, plain.expected(name)), (exact, exact.expected(name))
    ):  # fmt: skip
        (1024 * values.mean()).backward()
        assert all(gradient.isfinite().all() for gradient in one.student.gradients())
    if name == "total_variation":
        return
    cases = (ours, plain, exact)
    for gradients in zip(*(one.student.gradients() for one in cases), strict=True):
        assert_no_worse(*gradients, torch.float16)
