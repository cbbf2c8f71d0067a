"""The ways to compute a divergence between two heads that `divergence.py` compares.

Every function takes `student` and `teacher`, each hidden states (N, H) and a weight (V, H), the
`labels` (N,) that Liger asks for, and a kind; it returns the mean over tokens. Each imports its
library inside, so that a measured process loads only what it measures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from peers import LIGER, TRL
from torch import Tensor
from torch.nn import functional

Head = Literal["frozen", "trained"]
HEADS: tuple[Head, ...] = ("frozen", "trained")
Kind = Literal["forward_kl", "reverse_kl", "jsd"]
KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "jsd")
# The teacher's weight in the mixture; TRL and Liger name the two KLs by the ends of its range.
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


class Side(NamedTuple):
    """One model at its head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)


def wider(side: Side, generator: torch.Generator) -> Side:
    """A model of which half is another; the rest adds logits with a standard deviation of one."""
    hidden, weight = side
    more = torch.randn(hidden.shape, generator=generator)
    weight_of_more = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
    return Side(torch.cat((hidden, more), 1), torch.cat((weight, weight_of_more), 1))


@dataclass(frozen=True)
class Peer:
    """A way to compute the divergence."""

    name: str
    call: Callable[[Side, Side, Tensor, Kind], Tensor]
    install: str = ""  # the command that brings its library
    heads: tuple[Head, ...] = HEADS


def full_logits(student: Side, teacher: Side, labels: Tensor, kind: Kind) -> Tensor:
    """Plain PyTorch: all logits of both, log-softmax in at least float32."""
    return from_logits(student.hidden @ student.weight.T, teacher.hidden @ teacher.weight.T, kind)


def from_logits(student: Tensor, teacher: Tensor, kind: Kind) -> Tensor:
    """The formula, from logits (N, V)."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = torch.log_softmax(student, dim=-1, dtype=wide)
    log_p = torch.log_softmax(teacher, dim=-1, dtype=wide)
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    beta = BETA[kind]
    mixture = torch.logaddexp(
        log_p + torch.tensor(beta).log(), log_q + torch.tensor(1 - beta).log()
    )
    return beta * _kl(log_p, mixture) + (1 - beta) * _kl(log_q, mixture)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def trl_tokens(student: Side, teacher: Side, kind: Kind) -> Tensor:
    """TRL's chunked divergence of every token, called as its distillation trainer calls it."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    no_bias = None
    found: Tensor = ChunkedDivergenceFunction.apply(  # type: ignore[no-untyped-call]  # TRL's own
        student.hidden, student.weight, no_bias, teacher.hidden, teacher.weight, no_bias, BETA[kind]
    )[0]
    return found


def trl(student: Side, teacher: Side, labels: Tensor, kind: Kind) -> Tensor:
    """Mean of `trl_tokens`."""
    return trl_tokens(student, teacher, kind).mean()


def liger(student: Side, teacher: Side, labels: Tensor, kind: Kind) -> Tensor:
    """Liger's fused linear JSD without its cross-entropy term, not compiled, as it comes else."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[kind], compiled=False
    )
    found: Tensor = loss(student.hidden, student.weight, teacher.hidden, teacher.weight, labels)
    return found


def fastpref(student: Side, teacher: Side, labels: Tensor, kind: Kind) -> Tensor:
    """Call fastpref as it comes."""
    from fastpref import linear_divergence

    found: Tensor = linear_divergence(*student, *teacher, labels, kind=kind)
    return found.mean()


def fastpref_least(student: Side, teacher: Side, labels: Tensor, kind: Kind) -> Tensor:
    """The same with nothing kept for the backward pass."""
    from fastpref import linear_divergence

    found: Tensor = linear_divergence(*student, *teacher, labels, kind=kind, scratch_bytes=0)
    return found.mean()


BASELINE = "full logits"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(BASELINE, full_logits),
        Peer("TRL ChunkedDivergence", trl, install=TRL),
        Peer("Liger fused JSD", liger, install=LIGER),
        Peer("fastpref", fastpref),
        Peer("fastpref, scratch_bytes=0", fastpref_least, heads=("trained",)),
    )
}
