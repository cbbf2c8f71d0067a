"""Tests such as Liger's, of tiny sizes, which must reach fastpref."""

import formulas
import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss
from liger_kernel.chunked_loss.functional import (
    liger_fused_linear_cpo,
    liger_fused_linear_jsd,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
)
from torch.nn.functional import logsigmoid

HIDDEN, REFERENCE = torch.randn(2, 4, 3, 8).unbind()
WEIGHT, BIAS = torch.randn(20, 8), torch.randn(20)
LABELS = torch.tensor([[1, 2, 3], [4, 5, -100], [6, -100, -100], [7, 8, 9]])
LENGTHS = (LABELS != -100).sum(1)


def sums(hidden=HIDDEN, bias=BIAS):
    return formulas.linear_logps(hidden, formulas.Head(WEIGHT, bias), LABELS).sum(1)


def margin(values):
    return values[:2] - values[2:]


@pytest.mark.parametrize("average", [False, True])
def test_dpo(average):
    found, metrics = LigerFusedLinearDPOLoss(beta=0.5, average_log_prob=average)(
        WEIGHT, HIDDEN, LABELS, BIAS, REFERENCE, WEIGHT, None
    )
    over = LENGTHS if average else 1
    policy, reference = sums() / over, sums(REFERENCE, None) / over
    torch.testing.assert_close(found, -logsigmoid(0.5 * margin(policy - reference)).mean())
    torch.testing.assert_close(metrics[5], 0.5 * (policy - reference)[:2])
    mean = formulas.logits(HIDDEN, formulas.Head(WEIGHT, BIAS))[:2].mean()
    torch.testing.assert_close(metrics[2], mean)


def test_losses_without_a_reference():
    given, logps = (HIDDEN, WEIGHT, LABELS, BIAS), sums()
    means, nll = logps / LENGTHS, -logps[:2].sum() / LENGTHS[:2].sum()
    cpo = liger_fused_linear_cpo(*given, -100, 0.5, 0.3)[0]
    torch.testing.assert_close(cpo, 0.3 * nll - logsigmoid(0.5 * margin(logps)).mean())
    simpo = liger_fused_linear_simpo(*given, -100, 0.5, gamma=0.2)[0]
    torch.testing.assert_close(simpo, -logsigmoid(0.5 * margin(means) - 0.2).mean())
    orpo = liger_fused_linear_orpo(*given, -100, 0.5)[0]
    odds = margin(means - torch.log1p(-means.exp()))
    torch.testing.assert_close(orpo, nll - 0.5 * logsigmoid(odds).mean())


@pytest.mark.parametrize("kl", [-0.3, 0.3])
def test_kto(kl):
    good = torch.tensor([True, False, True, False])
    found = LigerFusedLinearKTOLoss(beta=0.5, use_ref_model=True)(
        HIDDEN, WEIGHT, LABELS, BIAS, good, REFERENCE, WEIGHT, None, torch.tensor([kl])
    )[0]
    gains = 0.5 * (sums() - sums(REFERENCE, None) - kl)
    torch.testing.assert_close(found, (1 - torch.where(good, gains, -gains).sigmoid()).mean())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd(beta):
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    hidden, teacher, labels = HIDDEN.flatten(0, 1), REFERENCE.flatten(0, 1), LABELS.flatten()
    found = liger_fused_linear_jsd(
        hidden, WEIGHT, teacher, WEIGHT, labels, BIAS, None, 0.4, 0.6, beta, -100, 2.0
    )
    mixed = {"beta": beta} if kind == "jsd" else {}
    log_q, log_p = (
        formulas.logits(one, formulas.Head(WEIGHT, bias), temperature=2.0).log_softmax(-1)
        for one, bias in ((hidden, BIAS), (teacher, None))
    )
    divergences = formulas.divergence(log_q, log_p, kind=kind, **mixed)[labels != -100]
    expected = (0.6 * divergences.sum() - 0.4 * sums().sum()) / LENGTHS.sum()
    torch.testing.assert_close(found, expected)
