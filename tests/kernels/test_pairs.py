"""Losses of pairs in one launch, against autograd of their float64 formulas."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from against_torch import (
    DEVICE,
    INF,
    NAN,
    QUIET,
    assert_as_good_as_torch,
    examples,
    randn,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref.kernels.pair_losses import LOSSES, PairLosses, pair_losses

pytestmark = QUIET


class Batch(NamedTuple):
    """Flat tokens of `2B` sequences, some of them empty or masked as a whole."""

    mask: Tensor
    offsets: Tensor
    logps: Tensor

    def sums(self, values: Tensor) -> Tensor:
        ends = self.offsets.tolist()
        masked = torch.where(self.mask, values, 0.0)
        return torch.stack([masked[a:b].sum() for a, b in zip(ends, ends[1:], strict=False)])


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    pairs = draw(st.integers(1, 3))
    lengths = draw(
        st.lists(st.sampled_from([0, 1, 3, 1100]), min_size=2 * pairs, max_size=2 * pairs)
    )
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, dtype)
    n = sum(lengths)
    # NaN where masked: what is there must not be read.
    mask = randn(0, n) > draw(st.sampled_from([-INF, -0.5, INF]))
    scale = draw(st.sampled_from([1e-3, 1.0]))
    return Batch(mask, offsets, torch.where(mask, -scale * randn(1, n).abs(), NAN))


def check_pairs(
    batch: Batch,
    actual: PairLosses,
    terms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
) -> None:
    """All outputs against autograd of the two `terms` of the logps and of `x`."""

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        logps = torch.where(batch.mask, batch.logps, 0.0).to(dtype).requires_grad_()
        leaf = x.to(dtype).requires_grad_()
        values = terms(logps, leaf)
        by_logps, by_x = torch.autograd.grad(
            sum(values).sum(), (logps, leaf), allow_unused=True, materialize_grads=True
        )
        return *(one.detach() for one in values), batch.sums(logps).detach(), by_logps, by_x

    names = ("first term", "second term", "logps_sums", "by_logps", "by_x")
    found = (*actual.terms, actual.logps_sums, actual.by_logps, actual.by_x)
    exact, by_torch = plain(torch.float64), plain(torch.float32)
    for name, *versions in zip(names, found, exact, by_torch, strict=True):
        # Losses and their slopes are exponentials of the sums.
        assert_as_good_as_torch(name, *versions, exact[2])
    assert actual.lengths.dtype == torch.int64
    assert actual.lengths.tolist() == batch.sums(batch.mask.double()).long().tolist()
    assert (actual.by_logps[~batch.mask] == 0).all()


def difference(values: Tensor) -> Tensor:
    chosen, rejected = values.chunk(2)
    return chosen - rejected


@examples
@given(
    batch=batches(),
    has_ref=st.booleans(),
    has_weights=st.booleans(),
    beta=st.sampled_from([0.1, 2.0]),
    alpha=st.sampled_from([0.0, 1.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    length_normalize=st.booleans(),
)
def test_tvkd_pairs(
    batch: Batch,
    has_ref: bool,
    has_weights: bool,
    beta: float,
    alpha: float,
    label_smoothing: float,
    length_normalize: bool,
) -> None:
    sequences = len(batch.offsets) - 1
    shaping = 10 * randn(2, sequences)
    ref_logps = 10 * randn(3, sequences) if has_ref else None
    weights = torch.where(batch.mask, randn(4, len(batch.mask)).abs(), NAN) if has_weights else None
    # Without alpha the shaping is not handed over.
    actual = pair_losses(
        "tvkd", batch.logps, batch.mask, batch.offsets, weights, shaping if alpha else None,
        ref_logps, beta, alpha, label_smoothing, length_normalize=length_normalize,
    )  # fmt: skip

    def terms(logps: Tensor, shaping: Tensor) -> tuple[Tensor, Tensor]:
        total = batch.sums(logps if weights is None else logps * weights.nan_to_num().to(logps))
        margin = beta * (total if ref_logps is None else total - ref_logps.to(logps))
        margin = margin - alpha * shaping
        if length_normalize:
            margin = margin / batch.sums(batch.mask.to(logps)).clamp(min=1)
        d = difference(margin)
        agree, differ = (torch.nn.functional.logsigmoid(one) for one in (d, -d))
        return -(1 - label_smoothing) * agree - label_smoothing * differ, torch.zeros_like(d)

    check_pairs(batch, actual, terms, shaping)


@examples
@given(
    batch=batches(),
    alpha=st.sampled_from([0.0, 0.1]),
    gamma=st.sampled_from([0.0, 1.0, 2.0]),
    length_normalize=st.booleans(),
    detach_focal=st.booleans(),
)
def test_drdo_pairs(
    batch: Batch, alpha: float, gamma: float, length_normalize: bool, detach_focal: bool
) -> None:
    sequences = len(batch.offsets) - 1
    student, oracle = randn(2, sequences), randn(3, sequences)
    actual = pair_losses(
        "drdo", batch.logps, batch.mask, batch.offsets, None, student, oracle,
        alpha, gamma, 0.0 if detach_focal else 1.0, length_normalize=length_normalize,
    )  # fmt: skip

    def terms(logps: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        z = batch.sums(logps)
        if length_normalize:
            z = z / batch.sums(batch.mask.to(logps)).clamp(min=1)
        below_zero = z[sequences // 2 :].clamp(max=-torch.finfo(torch.float32).tiny)
        log_odds = z[: sequences // 2] - torch.log(-torch.expm1(below_zero))
        focal = torch.exp(gamma * torch.nn.functional.logsigmoid(-difference(z)))
        focal = focal.detach() if detach_focal else focal
        error = difference(oracle.to(logps)) - difference(student)
        return error**2, -alpha * focal * log_odds

    check_pairs(batch, actual, terms, student)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-6, 1e-3, 0.3, 0.69, 0.7, 3.0, 20.0, 200.0])
def test_drdo_near_and_far_from_certainty(size: float) -> None:
    """`log1mexp` and its derivative are accurate to float32 rounding at any `z_l`."""
    batch = Batch(
        mask=torch.ones(2, dtype=torch.bool, device=DEVICE),
        offsets=torch.arange(3, device=DEVICE),
        logps=torch.tensor([-0.5, -size], device=DEVICE),
    )
    found = pair_losses(
        "drdo", batch.logps, batch.mask, batch.offsets, None, None, None,
        1.0, 0.0, 0.0, length_normalize=False,
    )  # fmt: skip
    logps = batch.logps.double().requires_grad_()
    below_zero = logps[1].clamp(max=-torch.finfo(torch.float32).tiny)
    exact = torch.log(-torch.expm1(below_zero)) - logps[0]
    exact.backward()
    torch.testing.assert_close(found.terms[1, 0].double(), exact.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.by_logps.double(), logps.grad, rtol=1e-6, atol=1e-12)


def test_no_pairs() -> None:
    batch = Batch(
        mask=torch.empty(0, dtype=torch.bool, device=DEVICE),
        offsets=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        logps=torch.empty(0, device=DEVICE),
    )
    for loss in LOSSES:
        found = pair_losses(
            loss, batch.logps, batch.mask, batch.offsets, None, None, None,
            0.1, 1.0, 0.0, length_normalize=False,
        )  # fmt: skip
        assert found.terms.shape == (2, 0)
