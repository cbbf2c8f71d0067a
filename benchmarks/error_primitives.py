"""The functions that `errors.py` measures: each by its formula, by fastpref and by its peers.

Every call takes `Inputs` and returns a number per token (N,), or several such by name; a peer that
has the mean over tokens only returns that, a scalar. Each imports its library inside.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

import logit_formulas as formulas
import torch
from contenders import CONTENDERS
from divergence_peers import KINDS as PEERS_KINDS
from divergence_peers import Kind, Side, liger, trl_tokens
from peers import LIGER, TRL, trl_outputs
from torch import Tensor

FASTPREF = "fastpref"
FULL = "full logits"
BETA = 0.1  # of the token preference: fastpref's default
Gradients = Literal["none", "hidden", "both"]
Statistic = Literal[
    "max_prob", "margin", "expected_logit", "entropy", "target_logit", "log_sum_squared_probs"
]
TAILS = ("bucket", "drop", "renormalize")
KINDS: dict[str, dict[str, Any]] = {
    "forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.5}, "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1}, "total_variation": {}, "jeffreys": {},
}  # fmt: skip


class Inputs(NamedTuple):
    """Three models at their heads, and what is known of the teacher's likeliest tokens."""

    student: Side
    teacher: Side
    reference: Side
    labels: Tensor  # (N,) int64
    ids: Tensor  # (N, K) int64, of the teacher's likeliest tokens
    logps: Tensor  # (N, K) float32, their log-probabilities

    def to(self, dtype: torch.dtype, device: str | None = None) -> "Inputs":
        """The same with models in another dtype, and all on another device if one is given."""
        student, teacher, reference = (
            Side(side.hidden.to(device, dtype), side.weight.to(device, dtype))
            for side in (self.student, self.teacher, self.reference)
        )
        labels, ids, logps = (one.to(device) for one in (self.labels, self.ids, self.logps))
        return Inputs(student, teacher, reference, labels, ids, logps)


Call = Callable[[Inputs], Tensor | dict[str, Tensor]]


@dataclass(frozen=True)
class Peer:
    """Another way to compute the same."""

    call: Call
    install: str = ""  # the command that brings its library
    needs_cuda: bool = False


@dataclass(frozen=True)
class Primitive:
    """One function."""

    name: str
    formula: Call  # of full logits, in at least float32 once there are logits
    fastpref: Call
    gradients: Gradients = "both"
    peers: dict[str, Peer] = field(default_factory=dict)


def _logits(side: Side) -> Tensor:
    """Logits (N, V): the product in the models' dtype, as one with a matrix, then at least wide."""
    logits = side.hidden @ side.weight.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logs(side: Side) -> Tensor:
    return _logits(side).log_softmax(-1)


def _logps(inputs: Inputs) -> Tensor:
    return _logs(inputs.student).gather(1, inputs.labels.unsqueeze(1)).squeeze(1)


def _statistics(inputs: Inputs) -> dict[str, Tensor]:
    found = formulas.statistics(_logits(inputs.student), inputs.labels)
    return {name: found[name] for name in get_args(Statistic)}


def _divergence(kind: str) -> Call:
    def call(inputs: Inputs) -> Tensor:
        log_q, log_p = _logs(inputs.student), _logs(inputs.teacher)
        return formulas.divergence(log_q, log_p, kind=kind, **KINDS[kind])

    return call


def _advantage(inputs: Inputs) -> Tensor:
    gain = _logs(inputs.teacher) - _logs(inputs.reference)
    return (_logs(inputs.student).exp() * gain).sum(1)


def _topk(tail: str) -> Call:
    return lambda i: formulas.topk_divergence(_logs(i.student), i.ids, i.logps, tail=tail)


def _expectation(inputs: Inputs) -> Tensor:
    at_tokens = _logs(inputs.student).gather(1, inputs.ids)
    return (at_tokens.exp() * inputs.logps).sum(1)


def _token_preference(inputs: Inputs) -> Tensor:
    logs = _logs(inputs.student), _logs(inputs.teacher)
    return formulas.token_preference(*logs, beta=BETA)


def _means(inputs: Inputs) -> Tensor:
    probabilities = _logs(inputs.teacher).exp()
    return probabilities @ inputs.student.weight.to(probabilities.dtype)


def _our(name: str, **options: Any) -> Call:
    """One of fastpref's functions with a student alone."""

    def call(inputs: Inputs) -> Tensor:
        import fastpref

        found = getattr(fastpref, name)(*inputs.student, inputs.labels, **options)
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)

    return call


def _our_logsumexp(inputs: Inputs) -> Tensor:
    from fastpref import linear_logsumexp

    return linear_logsumexp(*inputs.student)


def _our_statistics(inputs: Inputs) -> dict[str, Tensor]:
    from fastpref import linear_stats

    names: tuple[Statistic, ...] = get_args(Statistic)
    found = linear_stats(*inputs.student, inputs.labels, stats=names)
    return {name: found[name] for name in names}


def _our_divergence(name: str = "linear_divergence", **options: Any) -> Call:
    """One of fastpref's functions with a student and a teacher."""

    def call(inputs: Inputs) -> Tensor:
        import fastpref

        models = *inputs.student, *inputs.teacher
        found: Tensor = getattr(fastpref, name)(*models, inputs.labels, **options)
        return found

    return call


def _our_advantage(inputs: Inputs) -> Tensor:
    hidden, weight = inputs.reference
    return cast(
        Tensor,
        _our_divergence(kind="advantage", reference_hidden=hidden, reference_head=weight)(inputs),
    )


def _our_topk(name: str = "linear_topk_divergence", **options: Any) -> Call:
    """One of fastpref's functions of a few tokens."""

    def call(inputs: Inputs) -> Tensor:
        import fastpref

        tokens = inputs.ids, inputs.logps
        found: Tensor = getattr(fastpref, name)(*inputs.student, *tokens, inputs.labels, **options)
        return found

    return call


def _our_means(inputs: Inputs) -> Tensor:
    from fastpref import teacher_means

    return teacher_means(*inputs.teacher, inputs.student.weight, inputs.labels).weight


def _our_cached_kl(inputs: Inputs) -> Tensor:
    from fastpref import linear_cached_kl, teacher_means

    means = teacher_means(*inputs.teacher, inputs.student.weight, inputs.labels)
    return linear_cached_kl(*inputs.student, means, inputs.labels)


def _peers_of_logps() -> dict[str, Peer]:
    """Contenders of `speed.py` that give every token's log-probability and do not compile."""

    def peer(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        return lambda inputs: call(*inputs.student, inputs.labels)

    return {
        one.name: Peer(peer(one.call), one.install, one.needs_cuda)
        for one in CONTENDERS.values()
        if one.gives == "tokens" and not one.compiles and one.key not in ("full", "fastpref")
    }


def _trl_statistics(inputs: Inputs) -> dict[str, Tensor]:
    names = {"entropy": "entropy", "log_sum_squared_probs": "log_sum_sq_probs"}
    _, *found = trl_outputs(*inputs.student, inputs.labels, tuple(names.values()))
    return dict(zip(names, found, strict=True))


def _peers_of(kind: str) -> dict[str, Peer]:
    if kind not in PEERS_KINDS:
        return {}
    of_peers: Kind = kind
    return {
        "TRL ChunkedDivergence": Peer(lambda i: trl_tokens(i.student, i.teacher, of_peers), TRL),
        "Liger fused JSD": Peer(lambda i: liger(i.student, i.teacher, i.labels, of_peers), LIGER),
    }


PRIMITIVES = (
    Primitive("log-probs", _logps, _our("linear_logps"), peers=_peers_of_logps()),
    Primitive("log-probs, with stats", _logps, _our("linear_logps_with_stats")),
    Primitive("logsumexp", lambda i: _logits(i.student).logsumexp(1), _our_logsumexp),
    Primitive(
        "stats", _statistics, _our_statistics, "none",
        {"TRL ChunkedLogProb": Peer(_trl_statistics, TRL)},
    ),
    *(
        Primitive(kind, _divergence(kind), _our_divergence(kind=kind, **options),
                  peers=_peers_of(kind))
        for kind, options in KINDS.items()
    ),
    Primitive("advantage", _advantage, _our_advantage),
    *(Primitive(f"top-k, {tail}", _topk(tail), _our_topk(tail=tail)) for tail in TAILS),
    Primitive("top-k, expectation", _expectation, _our_topk("linear_topk_expectation")),
    Primitive("teacher means", _means, _our_means, "none"),
    Primitive("cached KL", _divergence("forward_kl"), _our_cached_kl, "hidden"),
    Primitive(
        "token preference", _token_preference,
        _our_divergence("linear_token_preference", beta=BETA),
    ),
)  # fmt: skip
