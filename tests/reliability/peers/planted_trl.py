"""Tests such as TRL's, of tiny sizes, which must reach fastpref."""

import formulas
import pytest
import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.sft_trainer import _chunked_cross_entropy_loss
from trl.trainer.utils import _ChunkedLogProbFunction, selective_log_softmax

HIDDEN, WEIGHT, LABELS = torch.randn(6, 8), torch.randn(20, 8), torch.randint(20, (6,))


class TestChunkedLogProbs:
    def test_values(self):
        found, entropy = _ChunkedLogProbFunction.apply(HIDDEN, WEIGHT, LABELS, 0.7, 4)
        expected = formulas.linear_logps(HIDDEN, WEIGHT, LABELS, temperature=0.7)
        torch.testing.assert_close(found, expected)
        logps = formulas.logits(HIDDEN, WEIGHT, temperature=0.7).log_softmax(-1)
        torch.testing.assert_close(entropy, -(logps.exp() * logps).sum(-1))

    def test_of_logits(self):
        logits = HIDDEN @ WEIGHT.T
        expected = logits.log_softmax(-1)
        torch.testing.assert_close(
            selective_log_softmax(logits, LABELS), expected.gather(1, LABELS[:, None])[:, 0]
        )
        several = torch.randint(20, (6, 3))
        found = selective_log_softmax(logits, several)
        torch.testing.assert_close(found, expected.gather(1, several))

    def test_mean_cross_entropy(self):
        labels = torch.tensor([[0, 1, -100, 3, 4, 5]])
        found = _chunked_cross_entropy_loss(HIDDEN[None], WEIGHT, 4, labels)
        expected = torch.nn.functional.cross_entropy(HIDDEN[:-1] @ WEIGHT.T, labels[0, 1:])
        torch.testing.assert_close(found[0], expected)
        assert found[3] == 4


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_jsd(beta):
    student, teacher = torch.randn(2, 2, 3, 5).unbind()
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 4]])
    kind = {0: "forward_kl", 1: "reverse_kl"}.get(beta, "jsd")
    mixed = {"beta": beta} if kind == "jsd" else {}
    log_q, log_p = ((one / 2).log_softmax(-1) for one in (student, teacher))
    expected = formulas.divergence(log_q, log_p, kind=kind, **mixed)[labels != -100]
    found = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, 2.0)
    torch.testing.assert_close(found, expected.mean())
