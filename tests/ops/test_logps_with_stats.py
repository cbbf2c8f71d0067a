"""Entropy and top-1 that come out of the pass `linear_logps` makes."""

from __future__ import annotations

import formulas
import pytest
import torch
from cases import DTYPES, Case, cases
from closeness import assert_no_worse
from hypothesis import given
from hypothesis import strategies as st

import fastpref
from fastpref import Head
from fastpref.ops import LogpsWithStats, tiling

# Every path: the Jacobian in the forward pass; the head trained, with kept tiles and without; none.
PATHS = {"frozen": (False, 0), "trained": (True, 0), "kept": (True, 10**7), "no gradient": None}


def run(case: Case, path: str, **more: object) -> LogpsWithStats:
    """In the dtype of the case, by one of the paths."""
    trained, scratch_bytes = PATHS[path] or (False, 0)
    case = case.to(case.hidden.dtype, trained=trained)
    with torch.set_grad_enabled(PATHS[path] is not None):
        return fastpref.linear_logps_with_stats(
            case.hidden, case.head, case.labels,
            **{"scratch_bytes": scratch_bytes, **case.options, **more},
        )  # fmt: skip


def stats_of(case: Case) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return formulas.linear_stats(case.hidden, case.head, case.labels, **case.options)


def of_logits(logits: torch.Tensor, labels: torch.Tensor, path: str, **more: object):
    return run(Case(logits, Head(torch.eye(logits.shape[-1]).to(logits)), labels), path, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases(), path=st.sampled_from(list(PATHS)), compact=st.booleans())
def test_equals_the_reference(dtype, case, path, compact):
    ours = case.to(dtype, trained=False)
    rough, exact = stats_of(ours), stats_of(ours.to(torch.float64, trained=False))
    found = run(ours, path, compact=compact)
    assert not found.entropy.requires_grad and not found.is_top1.requires_grad
    assert found.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_no_worse(found.entropy, rough["entropy"], exact["entropy"], dtype)
    assert_no_worse(found.logps, rough["target_logp"], exact["target_logp"], dtype)
    assert_no_worse(found.lse, rough["logsumexp"], exact["logsumexp"], dtype)
    assert (found.entropy[case.labels == case.options["ignore_index"]] == 0).all()


@given(case=cases(), path=st.sampled_from(list(PATHS)), compact=st.booleans())
def test_top1_is_that_of_linear_stats(case, path, compact):
    """Equal logits and labels of every rank; float64, where no product rounds them apart."""
    case = case.to(torch.float64, trained=False)
    head = case.head._replace(weight=case.head.weight.round(), bias=None)
    case = case._replace(hidden=case.hidden.round(), head=head)
    found = run(case, path, compact=compact)
    assert found.is_top1.dtype == torch.bool
    assert torch.equal(found.is_top1, stats_of(case)["is_top1"])


@given(case=cases(), path=st.sampled_from(list(PATHS)))
def test_is_the_same_for_any_tiling(case, path):
    case = case.to(torch.float64, trained=False)
    whole = run(case, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "ROWS_PER_TILE", 4)
        patch.setattr(tiling, "CPU_TILE_BYTES", 1)
        patch.setattr(tiling, "COLUMN_MULTIPLE", 16)
        tiled = run(case, path)
    torch.testing.assert_close(tiled.entropy, whole.entropy, rtol=1e-12, atol=1e-12)
    assert torch.equal(tiled.is_top1, whole.is_top1)


@given(case=cases(), trained=st.booleans(), scratch_bytes=st.sampled_from([0, 4000, 10**7]))
def test_gradients_are_those_without_stats(case, trained, scratch_bytes):
    def gradients(function) -> list[torch.Tensor]:
        leaves = case.to(torch.float64, trained=trained)
        found = function(
            leaves.hidden, leaves.head, leaves.labels, **leaves.options, scratch_bytes=scratch_bytes
        )
        logps = found.logps if isinstance(found, LogpsWithStats) else found
        logps.square().sum().backward()
        return [logps.detach(), *leaves.gradients()]

    for one, other in zip(
        gradients(fastpref.linear_logps_with_stats), gradients(fastpref.linear_logps), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("gap", [0.5, 9.0, 22.0, 40.0, 80.0])
def test_certain_models_keep_their_digits(gap, tiled, path, monkeypatch):
    """The label is the top, one of the others, and the same as where another is the top."""
    if tiled:
        monkeypatch.setattr(tiling, "CPU_TILE_BYTES", 1)
    vocab = 300
    logits = torch.zeros(3, vocab)
    logits[:2, 200], logits[2, 7] = gap, gap
    found = of_logits(logits, torch.tensor([200, 7, 290]), path)
    others = (vocab - 1) * torch.exp(torch.tensor(-gap, dtype=torch.float64))
    entropy = others.log1p() + others / (1 + others) * gap
    torch.testing.assert_close(found.entropy.double(), entropy.expand(3), rtol=4e-6, atol=0)
    logps = torch.stack([-others.log1p(), -gap - others.log1p(), -gap - others.log1p()])
    torch.testing.assert_close(found.logps.double(), logps, rtol=4e-6, atol=0)
    assert found.is_top1.tolist() == [True, False, False]


@pytest.mark.parametrize("path", PATHS)
def test_ties(path):
    """Equal largest logits in one tile and in several, on either side of the label."""
    logits = torch.full((3, 300), -1.0)
    logits[:, [3, 4, 299]] = 30.0
    found = of_logits(logits, torch.tensor([3, 299, 5]), path)
    assert found.is_top1.tolist() == [True, True, False]
    torch.testing.assert_close(found.entropy, torch.tensor(3.0).log().expand(3))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kept", [slice(3, 8), slice(390, 400), slice(0, 1), slice(128, 256)])
def test_masked_vocabulary_counts_for_nothing(kept, path):
    hidden, weight = torch.randn(3, 8), torch.randn(400, 8)
    bias = torch.full((400,), -torch.inf)
    bias[kept] = 0.5
    labels = torch.randint(0, kept.stop - kept.start, (3,))
    small = Case(hidden, Head(weight[kept], bias[kept]), labels)
    found = run(Case(hidden, Head(weight, bias), labels + kept.start), path)
    exact = stats_of(small.to(torch.float64, trained=False))
    assert_no_worse(found.entropy, stats_of(small)["entropy"], exact["entropy"], torch.float32)
    outside = run(Case(hidden, Head(weight, bias), torch.full((3,), 20)), path)
    torch.testing.assert_close(outside.entropy, found.entropy)
    assert not outside.is_top1.any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_rows_without_any_logit_and_nan(path):
    hidden, weight, labels = torch.randn(2, 8), torch.randn(300, 8), torch.tensor([3, 3])
    nowhere = run(Case(hidden, Head(weight, torch.full((300,), -torch.inf)), labels), path)
    assert nowhere.entropy.isnan().all()
    hidden[0, 3] = torch.nan
    found = run(Case(hidden, Head(weight), labels), path)
    assert found.entropy.isnan().tolist() == [True, False] and not found.is_top1[0]


@pytest.mark.parametrize("path", PATHS)
def test_a_vocabulary_of_one(path):
    found = of_logits(torch.tensor([[2.5], [-3.0]]), torch.tensor([0, 0]), path)
    assert found.entropy.tolist() == [0, 0] and found.is_top1.all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compact", [True, False])
def test_no_rows_at_all_and_all_ignored(compact, path):
    for hidden, labels in (
        (torch.randn(0, 8), torch.zeros(0, dtype=torch.int64)),
        (torch.randn(4, 8), torch.full((4,), -100)),
    ):
        found = run(Case(hidden, Head(torch.randn(5, 8)), labels), path, compact=compact)
        for values in found:
            assert values.tolist() == [0] * len(labels)


@pytest.mark.parametrize("path", PATHS)
def test_without_compaction_a_bad_label_is_nan_and_the_rest_is_right(path):
    hidden, head = torch.randn(4, 8), Head(torch.randn(10, 8))
    found = run(Case(hidden, head, torch.tensor([3, 10, -100, -1])), path, compact=False)
    right = run(Case(hidden, head, torch.tensor([3, -100, -100, -100])), path)
    assert found.entropy.isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(found.entropy[[0, 2]], right.entropy[[0, 2]])
    assert torch.equal(found.is_top1, right.is_top1)


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_without_graph_breaks(trained):
    hidden = torch.randn(2, 2, 5, requires_grad=True)
    weight, bias = torch.randn(11, 5, requires_grad=trained), torch.randn(11)
    labels = torch.tensor([[3, -100], [0, 10]])

    def call(hidden, weight, bias):
        head = Head(weight, bias, softcap=3.0)
        return tuple(fastpref.linear_logps_with_stats(hidden, head, labels))

    found = torch.compile(call, fullgraph=True)(hidden, weight, bias)
    for one, other in zip(found, call(hidden, weight, bias), strict=True):
        torch.testing.assert_close(one, other)
        assert one.shape == (2, 2)
    wanted = [hidden, weight] if trained else [hidden]
    assert all(one is not None for one in torch.autograd.grad(found[0].sum(), wanted))
