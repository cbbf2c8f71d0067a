"""Kernels run on the device of their operands, whichever one is current."""

from __future__ import annotations

import pytest
import torch
from launches import Device, launches

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("name", launches() if torch.cuda.device_count() > 1 else ["any"])
def test_the_same_bits_on_a_device_that_is_not_current(name):
    if len({torch.cuda.get_device_name(index) for index in (0, 1)}) > 1:
        pytest.skip("needs two devices of one kind")
    run = launches()[name]
    assert torch.cuda.current_device() == 0
    expected = run(Device("cuda:0"))
    found = run(Device("cuda:1"))
    assert torch.cuda.current_device() == 0
    for one, other in zip(found, expected, strict=True):
        assert one.device == torch.device("cuda:1")
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)
