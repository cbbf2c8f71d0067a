"""The ways to compute log-probabilities that `speed.py` times, one small function each.

Every function takes `hidden` (N, H), `weight` (V, H), `labels` (N,) and returns what its library
gives (`Gives`). Each imports its library inside, so that a measured process loads only what it
measures and a library that is not installed shows as an `ImportError` of its own.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import peers
import torch
from inputs import ROWS
from torch import Tensor

# What is returned: log-probabilities (N,); minus their sum, a scalar; or the DPO loss without a
# reference of two pairs, for which the N tokens are four rows, the chosen ones first.
Gives = Literal["tokens", "sum", "pairs"]
# Which gradients are wanted: none, that of hidden, those of hidden and weight.
Mode = Literal["no-grad", "frozen", "trained"]
MODES: tuple[Mode, ...] = ("no-grad", "frozen", "trained")
PASSES: dict[Mode, int] = {"no-grad": 1, "frozen": 2, "trained": 3}  # the fewest matrix products

SCRATCH = 512 * 2**20  # bytes


@dataclass(frozen=True)
class Contender:
    """A way to compute log-probabilities, and what it can do."""

    key: str  # for the command line
    name: str  # for tables
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    gives: Gives = "tokens"
    modes: tuple[Mode, ...] = MODES
    needs_cuda: bool = False
    compiles: bool = False  # by torch.compile, at the first call for some sizes


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Full logits under `torch.compile` with its default options."""
    return _compiled_full_logits(weight.shape)(hidden, weight, labels)


@functools.lru_cache(maxsize=1)
def _compiled_full_logits(head: torch.Size) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    _compile_anew(head)
    return torch.compile(peers.full_logits_logps)


@functools.lru_cache(maxsize=1)
def _compile_anew(head: torch.Size) -> None:
    """Forget what was compiled for another head.

    Else sizes that no one model changes would become variables of slower code, and after eight
    recompilations PyTorch would silently not compile at all.
    """
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def liger_dpo(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, is_compiled: bool = False
) -> Tensor:
    """Liger's fused DPO loss of two pairs; it holds the logits of one pair."""
    if is_compiled:
        _compile_anew(weight.shape)
    rows = hidden.view(ROWS, -1, hidden.shape[1])
    no_shaping = hidden.new_zeros(ROWS)
    return peers.liger_dpo(rows, weight, labels.view(ROWS, -1), no_shaping, compiled=is_compiled)


def liger_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused cross-entropy, summed: for sums it takes the gradients in the forward pass."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    no_bias = no_class_weights = None
    z_loss, smoothing = 0.0, 0.0
    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, labels, no_bias, no_class_weights, peers.IGNORE, z_loss, smoothing, "sum"
    )[0]
    return loss


def cce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cut Cross-Entropy as it comes: blocks of small probabilities are left out of gradients."""
    cut: Any = importlib.import_module("cut_cross_entropy")
    losses: Tensor = cut.linear_cross_entropy(hidden, weight, labels, reduction="none")
    return -losses.float()


def cce_exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cut Cross-Entropy without its filter, with float32 sums in the versions that have them."""
    cut: Any = importlib.import_module("cut_cross_entropy")
    known = inspect.signature(cut.linear_cross_entropy).parameters
    wide = {name: True for name in ("accum_e_fp32", "accum_c_fp32") if name in known}
    losses: Tensor = cut.linear_cross_entropy(
        hidden, weight, labels, reduction="none", filter_eps=None, **wide
    )
    return -losses.float()


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Quack's chunked cross-entropy, summed, as it comes: its scaled-exp pipeline where it can."""
    module: Any = importlib.import_module("quack.linear_cross_entropy")
    loss: Tensor = module.chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum")
    return loss


def fastpref(hidden: Tensor, weight: Tensor, labels: Tensor, *, scratch_bytes: int = 0) -> Tensor:
    """Call `fastpref.linear_logps` as it comes, or with scratch."""
    from fastpref import linear_logps

    return linear_logps(hidden, weight, labels, scratch_bytes=scratch_bytes)


def fastpref_tvkd(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`fastpref.tvkd_loss` of two pairs; without shaping it is the DPO loss."""
    rows = hidden.view(ROWS, -1, hidden.shape[1])
    return peers.fastpref(rows, weight, labels.view(ROWS, -1), hidden.new_zeros(ROWS).float())


GRADIENTS: tuple[Mode, ...] = ("frozen", "trained")
# In the order in which they are measured: if time runs out, it runs out on the last.
CONTENDERS = {
    contender.key: contender
    for contender in (
        Contender("full", "full logits", peers.full_logits_logps),
        Contender("fastpref", "fastpref", fastpref),
        Contender(
            "fastpref-scratch",
            "fastpref, 512 MiB scratch",
            functools.partial(fastpref, scratch_bytes=SCRATCH),
            modes=("trained",),  # a frozen head has no use for scratch
        ),
        Contender(
            "fastpref-tvkd", "fastpref tvkd_loss", fastpref_tvkd, gives="pairs", modes=GRADIENTS
        ),
        Contender(
            "liger-ce",
            "Liger fused cross-entropy",
            liger_cross_entropy,
            gives="sum",
            needs_cuda=True,
        ),
        Contender("liger-dpo", "Liger fused DPO", liger_dpo, gives="pairs", modes=GRADIENTS),
        Contender(
            "liger-dpo-compiled",
            "Liger fused DPO, compiled",
            functools.partial(liger_dpo, is_compiled=True),
            gives="pairs",
            modes=GRADIENTS,
            compiles=True,
            needs_cuda=True,  # not really, but compiling it would take most of a CPU's minutes
        ),
        Contender("cce", "CCE, filtered (default)", cce, needs_cuda=True),
        Contender("cce-exact", "CCE, exact", cce_exact, modes=GRADIENTS, needs_cuda=True),
        Contender("quack", "Quack", quack, gives="sum", needs_cuda=True),
        Contender("trl", "TRL ChunkedLogProb", peers.trl_chunked_logps),
        Contender("torch", "torch linear_cross_entropy", peers.torch_chunked_logps),
        Contender("compile", "full logits, torch.compile", compiled, compiles=True),
    )
}
