"""fastpref in the place of Cut Cross-Entropy: github.com/apple/ml-cross-entropy."""

from __future__ import annotations

from typing import Any

from standing_in import stand_in
from torch import Tensor

from fastpref import Head, linear_logps_with_stats, linear_logsumexp

TESTS = ("tests",)
REACHES = r""
WITHOUT = {
    r"indexed_dot": "a step of their forward pass that fastpref does not have alone",
    r"::test_vocab_parallel": "starts processes of its own, in which nothing stands in",
    r"test_loss_.*(torch_compile|cce_exact)": "the same call of another of their implementations",
}
ON_CPU = r"test_cce_loss|test_cce_lse"  # what names the device "cuda" and needs no GPU else


@stand_in
def linear_cross_entropy(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None, ignore_index: int = -100,
    softcap: float | None = None, reduction: str = "mean", shift: int = 0,
    return_lse: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """Minus `linear_logps`, reduced, and its logsumexp."""
    if shift:
        e, targets = e[..., :-shift, :], targets[..., shift:]
    head = Head(c, bias, softcap=softcap)
    found = linear_logps_with_stats(e, head, targets, ignore_index=ignore_index)
    loss = -found.logps
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (targets != ignore_index).sum()
    return (loss, found.lse) if return_lse else loss


@stand_in
def logsumexp(
    e: Tensor, c: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """`linear_logsumexp`."""
    return linear_logsumexp(e, Head(c, bias, softcap=softcap))


PLACES = {
    "cut_cross_entropy:linear_cross_entropy": linear_cross_entropy,
    "cut_cross_entropy.cce_lse_forward:cce_lse_forward_kernel": logsumexp,
}
