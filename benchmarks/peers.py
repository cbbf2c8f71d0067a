"""The ways to compute the TVKD loss that the benchmarks compare, one small function each.

Every function takes the same tensors and returns the scalar loss, ready for `backward()`:
`hidden` (2B, T, H), `weight` (V, H), `labels` (2B, T), `shaping` (2B,), rows 0..B-1 chosen. Each
imports its library inside, so that a measured process loads only what it measures and a library
that is not installed shows as an `ImportError` of its own row, with the command that brings it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

BETA = 0.01  # the TVKD authors' value; at 0.1 the sigmoid of such long responses saturates
IGNORE = -100

# The commands that bring each library, in the versions that the functions below are written for.
TORCH = "pip install 'torch>=2.13'"
TRL = "pip install 'trl>=1.16,<1.17'"
LIGER = "pip install 'liger-kernel>=0.8.5'"

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A way to compute the loss, and what it can do."""

    name: str
    loss: LossFunction
    takes_shaping: bool = True  # False: it computes DPO without a reference, which is alpha = 0
    heads: tuple[str, ...] = ("frozen", "trained")
    install: str = ""  # the command that brings its library


def why_missing(error: ImportError, install: str) -> str:
    """Which module is missing, and what brings it."""
    # What follows the bracket is a path on this machine.
    module = str(error).split(" (")[0]
    return f"{module}; {install} brings it" if install else module


def tvkd(logps: Tensor, shaping: Tensor, alpha: float = 1.0) -> Tensor:
    """TVKD loss of summed log-probabilities (2B,) and summed shaping (2B,)."""
    chosen, rejected = (BETA * logps - alpha * shaping).chunk(2)
    return -functional.logsigmoid(chosen - rejected).mean()


def full_logits_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Plain PyTorch: all (..., V) logits at once, log-softmax in float32, gather; (...) float32."""
    logps = torch.log_softmax(hidden @ weight.T, dim=-1, dtype=torch.float32)
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, shaping: Tensor) -> Tensor:
    """TVKD of `full_logits_logps`."""
    return tvkd(full_logits_logps(hidden, weight, labels).sum(-1), shaping)


def torch_chunked_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own chunked loss, with the options that it chooses itself; (...) float32."""
    from torch.nn import LinearCrossEntropyOptions

    losses = functional.linear_cross_entropy(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        reduction="none",
        options=LinearCrossEntropyOptions(),
    )
    return -losses.float().view_as(labels)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, shaping: Tensor) -> Tensor:
    """TVKD of `torch_chunked_logps`."""
    return tvkd(torch_chunked_logps(hidden, weight, labels).sum(-1), shaping)


def trl_chunked_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's chunked log-probabilities, called as its trainers call it; (...) float32."""
    return trl_outputs(hidden, weight, labels)[0]


def trl_outputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, more: tuple[str, ...] = ()
) -> list[Tensor]:
    """TRL's log-probabilities, and what else is asked for by its names; (...) float32 each."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    vocabulary_chunk = 32_768  # what TRL's trainers pass
    temperature, softcap, logit_scale = 1.0, None, 1.0
    found = ChunkedLogProbFunction.apply(  # type: ignore[no-untyped-call]  # TRL's own
        hidden.flatten(0, -2),
        weight,
        None,
        labels.flatten(),
        temperature,
        vocabulary_chunk,
        softcap,
        logit_scale,
        ("log_probs", *more),
    )
    return [one.view_as(labels) for one in found if one is not None]


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, shaping: Tensor) -> Tensor:
    """TVKD of `trl_chunked_logps`."""
    return tvkd(trl_chunked_logps(hidden, weight, labels).sum(-1), shaping)


def liger_scaled_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's loss of every token, for any incoming gradient; (...) float32.

    On Hopper two kernels of CuTe DSL in bfloat16; elsewhere logits of 512 tokens at a time, and
    the head's gradient whether or not it is wanted.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    losses: Tensor = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden.flatten(0, -2), weight, labels.flatten()
    )
    return -losses.float().view_as(labels)


def liger_scaled(hidden: Tensor, weight: Tensor, labels: Tensor, shaping: Tensor) -> Tensor:
    """TVKD of `liger_scaled_logps`."""
    return tvkd(liger_scaled_logps(hidden, weight, labels).sum(-1), shaping)


def liger_dpo(
    hidden: Tensor, weight: Tensor, labels: Tensor, shaping: Tensor, *, compiled: bool = False
) -> Tensor:
    """Liger's fused DPO loss, one pair at a time as by default, without a reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    # Not compiled by default: that is a choice of its own, and no other peer in memory.py is.
    dpo = LigerFusedLinearDPOLoss(
        ignore_index=IGNORE, beta=BETA, use_ref_model=False, compiled=compiled, chunk_size=1
    )
    loss: Tensor = dpo(weight, hidden, labels)[0]
    return loss


def fastpref(hidden: Tensor, weight: Tensor, labels: Tensor, shaping: Tensor) -> Tensor:
    """Call fastpref as it comes."""
    from fastpref import tvkd_loss

    return tvkd_loss(hidden, weight, labels, shaping, beta=BETA).loss


def fastpref_least(hidden: Tensor, weight: Tensor, labels: Tensor, shaping: Tensor) -> Tensor:
    """Call fastpref in the least memory: nothing is kept for the backward pass but inputs."""
    from fastpref import tvkd_loss

    return tvkd_loss(hidden, weight, labels, shaping, beta=BETA, scratch_bytes=0).loss


BASELINE = "full logits"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(BASELINE, full_logits),
        Peer("torch linear_cross_entropy", torch_chunked, install=TORCH),
        Peer("TRL ChunkedLogProb", trl_chunked, install=TRL),
        Peer("Liger scaled cross-entropy", liger_scaled, install=LIGER),
        Peer("Liger fused DPO", liger_dpo, takes_shaping=False, install=LIGER),
        Peer("fastpref", fastpref),
        # A frozen head needs no second look at the logits, so scratch changes nothing there.
        Peer("fastpref, scratch_bytes=0", fastpref_least, heads=("trained",)),
    )
}
