"""`torch.compile` of what `tests/ops/test_compile.py` leaves out: two compilations, any lengths."""

from __future__ import annotations

import torch
from every_function import TRAINED, batch, gradients, leaves_of, total
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

OF_TOKENS = ("hidden", "labels")


def test_compiles_twice_whatever_the_lengths():
    def loss(given: dict[str, Tensor]) -> Tensor:
        return total(TRAINED["tvkd_loss"](given, True))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for length in (6, 12, 7):
        given = batch()
        for one in OF_TOKENS:
            longer = given[one].repeat(1, 10, *[1] * (given[one].dim() - 2))
            given[one] = longer[:, :length].contiguous()
        for one in leaves_of(True):
            given[one].requires_grad_()
        found, expected = (gradients(given, one(given)) for one in (compiled, loss))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 2
