"""The fences that stand in for memcheck, and the fresh memory that stands in for initcheck."""

from __future__ import annotations

import ctypes
import signal

import pytest
import torch
from fenced import Fenced
from forked import exit_code

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # it reads bytes


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize(("side", "beyond"), [("after", 0), ("before", -1)])
def test_a_byte_beyond_a_tensor_ends_the_process(dtype, side, beyond):
    with Fenced(side):
        tensor = torch.ones(1301, dtype=dtype)
    first = tensor.data_ptr()
    end = first + (tensor.nbytes if side == "after" else 0) + beyond
    inside = first if side == "before" else end - 1
    assert exit_code(lambda: ctypes.string_at(inside, 1)) == 0
    assert exit_code(lambda: ctypes.string_at(end, 1)) == -signal.SIGSEGV


@pytest.mark.parametrize("side", ["after", "before"])
def test_tensors_stay_what_they_are(side):
    plain = torch.randn(3, 8)
    with Fenced(side):
        whole = plain * 1
        view = whole[1:, ::2]
        whole.t().mul_(2)
        wide = torch.empty_like(plain.t())
        empty = torch.empty(0, 3)
    assert torch.equal(whole, 2 * plain) and torch.equal(view, 2 * plain[1:, ::2])
    assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert wide.stride() == plain.t().stride() and wide.isnan().all()
    assert empty.shape == (0, 3)
