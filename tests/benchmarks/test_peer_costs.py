"""How many matrix products each peer needs: the counts in the README's comparison."""

from __future__ import annotations

import pytest
import torch
from counting import flops_of
from peers import PEERS

ROWS, LENGTH, WIDTH, VOCAB = 4, 16, 16, 400
PASS = 2 * ROWS * LENGTH * WIDTH * VOCAB

PRODUCTS = {  # peer: with a frozen head, with a trained one
    "full logits": (2, 3),
    "torch linear_cross_entropy": (3, 4),
    "TRL ChunkedLogProb": (3, 4),
    "Liger scaled cross-entropy": (4, 4),  # where its kernels do not run, as on a CPU
    "Liger fused DPO": (2, 3),
    "fastpref": (2, 3),
    "fastpref, scratch_bytes=0": (2, 4),
}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS.keys())
@pytest.mark.filterwarnings("ignore")  # other libraries' notices
def test_matrix_products(peer, trained):
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=trained)
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH))

    def step() -> None:
        peer.loss(hidden, weight, labels, torch.zeros(ROWS)).backward()

    try:
        step()
    except ImportError as error:
        pytest.skip(str(error))
    assert flops_of(step) == PRODUCTS[peer.name][trained] * PASS
