"""What `every_function` has, once more and from full logits: PyTorch's answer to extremes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import every_function
import formulas
import torch
from every_function import Given, head
from torch import Tensor

import fastpref
from fastpref.losses import drdo, tvkd
from fastpref.ops.divergences import KINDS

Outputs = list[Tensor]


def _of_kind(kind: str) -> every_function.Function:
    def call(given: Given, compact: bool) -> Tensor:
        return fastpref.linear_divergence(
            given["hidden"], head(given), given["teacher"], given["of_teacher"], given["labels"],
            kind=kind, compact=compact, **_reference(given, kind), **given.get("options", {}),
        )  # fmt: skip

    return call


def _reference(given: Given, kind: str) -> dict[str, Tensor]:
    if kind != "advantage":
        return {}
    return {
        "reference_hidden": given["hidden"].detach(),
        "reference_head": given["weight"].detach(),
    }


# Every function, and every kind of divergence.
TRAINED = every_function.TRAINED | {kind: _of_kind(kind) for kind in KINDS}
EVERY = every_function.EVERY | TRAINED


def _stats(given: Given) -> dict[str, Tensor]:
    return formulas.linear_stats(given["hidden"], head(given), given["labels"], **_options(given))


def _options(given: Given) -> dict[str, float]:
    return given.get("options", {})


def _logps(given: Given) -> Outputs:
    return [formulas.linear_logps(given["hidden"], head(given), given["labels"], **_options(given))]


def _with_stats(given: Given) -> Outputs:
    stats = _stats(given)
    return [stats[name] for name in ("target_logp", "logsumexp", "entropy", "is_top1")]


def _plain_with_stats(given: Given) -> Outputs:
    return _with_stats(given | {"transform": {}})


def _divergence(given: Given, kind: str = "jsd") -> Outputs:
    reference = tuple(_reference(given, kind).values()) or None
    return [
        formulas.linear_divergence(
            (given["hidden"], head(given)), (given["teacher"], given["of_teacher"]),
            given["labels"], kind=kind, reference=reference, **_options(given),
        )
    ]  # fmt: skip


def _known(given: Given) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities of some tokens, and of all others together."""
    q = formulas.logits(given["hidden"], head(given), **_options(given))
    others = torch.ones_like(q, dtype=torch.bool).scatter(-1, given["ids"], False)
    log_q = q.log_softmax(-1)
    rest = log_q.masked_fill(~others, -torch.inf).logsumexp(-1)
    return log_q.gather(-1, given["ids"]), rest


def _topk(given: Given) -> Outputs:
    log_q, rest = _known(given)
    log_p = given["known"].to(log_q.dtype)
    of_tokens = log_p.exp() * (log_p - log_q)
    divergence = torch.where(log_p.exp() > 0, of_tokens, 0).sum(-1)
    if given["weight"].shape[0] > given["ids"].shape[-1]:
        of_rest = (1 - log_p.exp().sum(-1)).clamp_min(torch.finfo(log_p.dtype).tiny).log()
        divergence = divergence + of_rest.exp() * (of_rest - rest)
    return [divergence.masked_fill(given["labels"] == -100, 0)]


def _expectation(given: Given) -> Outputs:
    log_q, _ = _known(given)
    found = (log_q.exp() * given["known"].to(log_q.dtype)).sum(-1)
    return [found.masked_fill(given["labels"] == -100, 0)]


def _preference(given: Given) -> Outputs:
    models = (given["hidden"], head(given)), (given["teacher"], given["of_teacher"])
    # Of the logits: rounding makes equals of log-probabilities that are next to one another.
    student, teacher = (formulas.logits(*model).argmax(-1) for model in models)
    return [
        formulas.linear_token_preference(
            *models, given["labels"], beta=0.1, tokens=(teacher, student), **_options(given)
        )
    ]


def _cached_kl(given: Given) -> Outputs:
    plain = given | {"transform": {}}
    lse = formulas.logits(given["hidden"], head(plain), **_options(given)).logsumexp(-1)
    mean = (given["hidden"] * given["means"]).sum(-1) + given["mean_bias"]
    found = lse - mean / _options(given).get("temperature", 1.0) - given["entropy"]
    return [found.masked_fill(given["labels"] == -100, 0)]


def _means(given: Given) -> Outputs:
    teacher = formulas.logits(given["teacher"], given["of_teacher"], **_options(given))
    log_p = teacher.log_softmax(-1)
    p = log_p.exp()
    ignored = given["labels"] == -100
    bias = torch.where(p > 0, p * given["bias"], 0).sum(-1)
    entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
    return [
        (p @ given["weight"]).masked_fill(ignored.unsqueeze(-1), 0),
        *(one.masked_fill(ignored, 0) for one in (bias, entropy)),
    ]


def _shaping(given: Given) -> Outputs:
    return [
        formulas.teacher_shaping(given["states"], head(given), given["labels"], **_options(given))
    ]


def _sums(given: Given) -> Outputs:
    mask = given["labels"] != -100
    return [torch.where(mask, given["logps"], 0).sum(1), mask.sum(1)]


def _responses(given: Given) -> fastpref.Responses:
    return fastpref.sum_responses(_logps(given)[0], given["labels"])


FULL: dict[str, Callable[[Given], Any]] = {
    "linear_logps": _logps,
    "linear_logps_with_stats": _with_stats,
    "linear_logsumexp": lambda given: [
        formulas.linear_logsumexp(given["hidden"], head(given), **_options(given))
    ],
    "linear_divergence": _divergence,
    "linear_divergence_with_stats": lambda given: (
        _divergence(given, "reverse_kl") + _with_stats(given)
    ),
    "linear_topk_divergence": _topk,
    "linear_topk_divergence_with_stats": lambda given: _topk(given) + _with_stats(given),
    "linear_topk_expectation": _expectation,
    "linear_token_preference": _preference,
    # The metrics of losses are those of responses.
    "tvkd_loss": lambda given: list(tvkd(_responses(given), given["shaping"])[:1]),
    "drdo_loss": lambda given: list(
        drdo(_responses(given), given["rewards"], given["oracle"], length_normalize=True)[:1]
    ),
    "linear_cached_kl": _cached_kl,
    "linear_cached_kl_with_stats": lambda given: _cached_kl(given) + _plain_with_stats(given),
    "linear_stats": lambda given: [
        _stats(given)[name]
        for name in ("logsumexp", "margin", "expected_logit", "target_logp", "is_top1")
    ],
    "teacher_means": _means,
    "teacher_shaping": _shaping,
    "sum_responses": _sums,
    "sequence_rewards": lambda given: [
        formulas.sequence_rewards(given["states"], given["labels"], given["reward_head"])
    ],
    "shaping_from_values": lambda given: [
        formulas.shaping_from_values(given["values"], given["labels"])
    ],
    **{kind: lambda given, kind=kind: _divergence(given, kind) for kind in KINDS},
}
