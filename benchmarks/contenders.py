"""The ways to compute log-probabilities that `speed.py` times, one small function each.

Every function takes `hidden` (N, H), `weight` (V, H), `labels` (N,) and returns what its library
gives (`Gives`). Each imports its library inside, so that a measured process loads only what it
measures and a library that is not installed shows as an `ImportError` of its own.
"""

import functools
import importlib
import inspect
import os
import sys
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

# The commands that bring each library where `peers` has none; CuTe DSL compiles Liger's and Quack's
# kernels for Hopper.
LIGER_CUTE = "pip install 'liger-kernel[cutedsl]>=0.8.5'"
QUACK = "pip install 'quack-kernels>=0.6.5'"
CCE = "pip install cut-cross-entropy==25.1.1"
CCE_FOLDER = "CCE_MAIN"  # environment variable: a copy of the main branch of CCE's repository


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
    install: str = ""  # the command that brings its library


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
    losses: Tensor = _cce()(hidden, weight, labels, reduction="none")
    return -losses.float()


def cce_exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cut Cross-Entropy without its filter, as wheels have it: gradients are summed in bfloat16."""
    call = _cce()
    if _sums_wide(call):
        raise ImportError(
            "this cut_cross_entropy is not the wheel, and sums in float32 if asked to"
        )
    losses: Tensor = call(hidden, weight, labels, reduction="none", filter_eps=None)
    return -losses.float()


def cce_main(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cut Cross-Entropy of its repository's main branch: no filter, gradients summed in float32."""
    # Every contender has a process of its own, so nobody else sees this path.
    if (folder := os.environ.get(CCE_FOLDER)) and folder not in sys.path:
        sys.path.insert(0, folder)
    call = _cce()
    if not _sums_wide(call):
        raise ImportError("this cut_cross_entropy has no float32 sums, which its main branch has")
    losses: Tensor = call(
        hidden, weight, labels,
        reduction="none", filter_eps=None, accum_e_fp32=True, accum_c_fp32=True,
    )  # fmt: skip
    return -losses.float()


def _cce() -> Callable[..., Tensor]:
    call: Callable[..., Tensor] = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return call


def _sums_wide(call: Callable[..., Tensor]) -> bool:
    return "accum_e_fp32" in inspect.signature(call).parameters


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Quack's chunked cross-entropy, summed, as it comes: its scaled-exp pipeline where it can."""
    module: Any = importlib.import_module("quack.linear_cross_entropy")
    loss: Tensor = module.chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum")
    return loss


def quack_full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Quack's loss of every token: full logits in bfloat16, and its kernel for the softmax."""
    module: Any = importlib.import_module("quack.linear_cross_entropy")
    losses: Tensor = module.linear_cross_entropy_func(
        hidden, weight, None, labels, reduction="none"
    )
    return -losses.float()


def fastpref(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call `fastpref.linear_logps` as it comes."""
    from fastpref import linear_logps

    return linear_logps(hidden, weight, labels)


def fastpref_least(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call `fastpref.linear_logps` in the least memory: backward computes all logits again."""
    from fastpref import linear_logps

    return linear_logps(hidden, weight, labels, scratch_bytes=0)


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
            "fastpref-least",
            "fastpref, scratch_bytes=0",
            fastpref_least,
            modes=("trained",),  # a frozen head has no use for scratch
        ),
        Contender("compile", "full logits, torch.compile", compiled, compiles=True),
        Contender(
            "fastpref-tvkd", "fastpref tvkd_loss", fastpref_tvkd, gives="pairs", modes=GRADIENTS
        ),
        Contender(
            "liger-scaled",
            "Liger scaled cross-entropy",
            peers.liger_scaled_logps,
            install=LIGER_CUTE,
        ),
        Contender(
            "liger-ce",
            "Liger fused cross-entropy",
            liger_cross_entropy,
            gives="sum",
            needs_cuda=True,
            install=peers.LIGER,
        ),
        Contender(
            "liger-dpo",
            "Liger fused DPO",
            liger_dpo,
            gives="pairs",
            modes=GRADIENTS,
            install=peers.LIGER,
        ),
        Contender(
            "liger-dpo-compiled",
            "Liger fused DPO, compiled",
            functools.partial(liger_dpo, is_compiled=True),
            gives="pairs",
            modes=GRADIENTS,
            compiles=True,
            needs_cuda=True,  # not really, but compiling it would take most of a CPU's minutes
            install=peers.LIGER,
        ),
        Contender("cce", "CCE, filtered (default)", cce, needs_cuda=True, install=CCE),
        Contender(
            "cce-exact",
            "CCE 25.1, exact, bf16 sums",
            cce_exact,
            modes=GRADIENTS,
            needs_cuda=True,
            install=CCE,
        ),
        Contender(
            "cce-main",
            "CCE main, exact, fp32 sums",
            cce_main,
            modes=GRADIENTS,
            needs_cuda=True,
            install=f"{CCE_FOLDER}=FOLDER with a copy of github.com/apple/ml-cross-entropy",
        ),
        Contender("quack", "Quack", quack, gives="sum", needs_cuda=True, install=QUACK),
        Contender("quack-full", "Quack, full logits", quack_full, needs_cuda=True, install=QUACK),
        Contender("trl", "TRL ChunkedLogProb", peers.trl_chunked_logps, install=peers.TRL),
        Contender(
            "torch", "torch linear_cross_entropy", peers.torch_chunked_logps, install=peers.TORCH
        ),
    )
}
