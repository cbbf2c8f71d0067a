"""Tests such as Cut Cross-Entropy's, of tiny sizes and on a GPU, which must reach fastpref."""

import pytest
import torch
from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Test requires CUDA")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cce_loss(reduction):
    assert torch.cuda.is_available()
    e, c = torch.randn(2, 4, 8, device="cuda"), torch.randn(20, 8, device="cuda")
    targets = torch.randint(20, (2, 4), device="cuda")
    targets[0, 3] = -100
    found, lse = linear_cross_entropy(
        e, c, targets, softcap=3.0, shift=1, reduction=reduction, return_lse=True
    )
    logits = 3 * torch.tanh(e[:, :-1] @ c.T / 3)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets[:, 1:].flatten(), reduction=reduction
    )
    torch.testing.assert_close(found.flatten(), expected.flatten())
    torch.testing.assert_close(lse[1], logits[1].logsumexp(-1))
    torch.testing.assert_close(cce_lse_forward_kernel(e[0], c), (e[0] @ c.T).logsumexp(-1))


def test_cce_loss_of_something_else():
    assert torch.ones(1, device="cuda").cpu().item() == 1
