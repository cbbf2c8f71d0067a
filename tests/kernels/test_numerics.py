"""Scalar functions of the kernels, over the whole range of their arguments."""

import pytest
import torch
import triton
import triton.language as tl
from against_torch import DEVICE, INF, NAN, QUIET
from torch import Tensor

from fastpref.kernels import numerics

pytestmark = QUIET


@triton.jit
def _tanh_kernel(x_ptr, tanh_ptr, damping_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tanh, damping = numerics.tanh(tl.load(x_ptr + index))
    tl.store(tanh_ptr + index, tanh)
    tl.store(damping_ptr + index, damping)


def tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    found, damping = torch.empty_like(x), torch.empty_like(x)
    _tanh_kernel[(1,)](x, found, damping, BLOCK=len(x))
    return found, damping


def test_tanh_is_as_good_near_zero_as_where_it_saturates() -> None:
    x = torch.cat([torch.logspace(-30, 2, 2**13), torch.linspace(0.01, 12, 2**13)]).to(DEVICE)
    for signed in (x, -x):
        found, damping = tanh(signed)
        exact = signed.double().tanh()
        assert ((found - exact) / exact).abs().max() <= 5 * 2**-23
        # Rounding tanh to float32 before it is squared would cost four times the last term.
        exact_damping = signed.double().cosh() ** -2
        assert ((damping - exact_damping).abs() <= 2**-21 * exact_damping + 2**-26).all()


def test_tanh_of_what_is_not_finite() -> None:
    found, damping = tanh(torch.tensor([INF, -INF, NAN, 0.0], device=DEVICE))
    assert found[:2].tolist() == pytest.approx([1.0, -1.0])
    assert damping[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert found[2].isnan()
    assert (found[3].item(), damping[3].item()) == (0.0, 1.0)


@triton.jit
def _log1p_kernel(u_ptr, log_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(log_ptr + index, numerics.log1p(tl.load(u_ptr + index)))


def test_log1p_of_small_and_large_numbers() -> None:
    u = torch.cat([torch.logspace(-30, 6, 2**13), torch.linspace(0, 3, 2**13)]).to(DEVICE)
    found = torch.empty_like(u)
    _log1p_kernel[(1,)](u, found, BLOCK=len(u))
    exact = u.double().log1p()
    assert ((found - exact).abs() <= 4 * 2**-23 * exact).all()
