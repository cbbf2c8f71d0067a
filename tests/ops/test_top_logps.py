"""The likeliest tokens are those of full logits."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import HashStore

from fastpref import Head
from fastpref.ops import tiling
from fastpref.ops.top_logps import top_logps


@pytest.mark.parametrize("softcap", [None, 0.9, 30.0])
@pytest.mark.parametrize("few_rows", [False, True], ids=["one block", "blocks"])
def test_equals_full_logits(softcap, few_rows, monkeypatch):
    if few_rows:
        monkeypatch.setattr(tiling, "CPU_BLOCK_BYTES", 3 * 2 * 24 * 4)
    hidden, weight, bias = torch.randn(7, 5), torch.randn(20, 5) / 9, torch.randn(20) / 9
    tokens, logps = top_logps(hidden, Head(weight, bias, 1.5, softcap), 4, temperature=0.7)
    logits = 1.5 * (hidden.double() @ weight.double().T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected, likeliest = (logits / 0.7).log_softmax(1).topk(4)
    assert torch.equal(tokens, likeliest) and logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    found = top_logps(hidden.double(), weight.double(), 20)[1]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.exp().sum(1), torch.ones(7).double())
    plain = (hidden.double() @ weight.double().T).log_softmax(1).amax(1)
    torch.testing.assert_close(found[:, 0], plain)


def test_a_sharded_head_is_refused():
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        head = Head(torch.zeros(11, 5), group=torch.distributed.group.WORLD)
        with pytest.raises(ValueError, match="head: expected one that is not sharded"):
            top_logps(torch.zeros(4, 5), head, 2)
    finally:
        torch.distributed.destroy_process_group()
