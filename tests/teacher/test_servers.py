"""What the documentation says of values and log-probabilities from a server."""

from __future__ import annotations

import torch

from fastpref import Head, linear_logsumexp, linear_stats


@torch.no_grad()
def test_log_probabilities_lose_the_value_and_one_raw_logit_brings_it_back():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    shift = torch.full((30,), 2.5, dtype=torch.float64)
    token = torch.randint(30, (5,))

    def answer(bias):
        stats = ("target_logit", "target_logp", "max_prob", "margin")
        head = Head(weight, bias)
        return linear_stats(hidden, head, token, stats=stats), linear_logsumexp(hidden, head)

    (plain, value), (shifted, shifted_value) = answer(None), answer(shift)
    torch.testing.assert_close(shifted_value, value + 2.5)
    for name in ("target_logp", "max_prob", "margin"):
        torch.testing.assert_close(shifted[name], plain[name])
    for found, expected in ((plain, value), (shifted, shifted_value)):
        torch.testing.assert_close(found["target_logit"] - found["target_logp"], expected)
