"""Calls of every public function that takes tensors, each beside the same from full logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import formulas
import torch
from problems import Given, Problem
from torch import Tensor

import fastpref
from fastpref import Head, Responses
from fastpref.losses import METHODS

Function = Callable[[Problem, Given], Any]
STATS = (
    "logsumexp", "max_prob", "margin", "expected_logit", "entropy", "target_logit", "target_logp",
    "log_sum_squared_probs",
)  # fmt: skip


def _reference(p: Problem, g: Given) -> tuple[Tensor, Tensor]:
    return g["reference"][:, :-1], g["of_reference"]


def _divergence(function: Callable[..., Any], p: Problem, g: Given) -> Any:
    reference = {}
    if p.kind == "advantage":
        names = ("reference_hidden", "reference_head")
        reference = dict(zip(names, _reference(p, g), strict=True))
    return function(
        *p.student(g), *p.teacher(g), p.labels, **p.with_kind(g), **reference, **p.scratch()
    )


def _plain_divergence(p: Problem, g: Given, head: Head, **options: Any) -> Tensor:
    return formulas.linear_divergence(
        (g["states"][:, :-1], head), p.teacher(g), p.labels, **options, **p.plain()
    )


def _plain_of_kind(p: Problem, g: Given) -> Tensor:
    reference = {"reference": _reference(p, g)} if p.kind == "advantage" else {}
    return _plain_divergence(p, g, p.head(g), **p.with_kind(g), **reference)


def _plain_cached(p: Problem, g: Given) -> Tensor:
    return _plain_divergence(p, g, p.frozen(g), kind="forward_kl")


def _of_student(p: Problem, g: Given, head: Head) -> tuple[Tensor, ...]:
    """What functions with statistics say of the student."""
    stats = formulas.linear_stats(g["states"][:, :-1], head, p.labels, **p.plain())
    return stats["target_logp"], stats["logsumexp"], stats["entropy"].detach()


def _means(p: Problem, g: Given) -> fastpref.TeacherMeans:
    return fastpref.teacher_means(*p.teacher(g), p.frozen(g), p.labels, **p.options())


def _cached(function: Callable[..., Any], p: Problem, g: Given) -> Any:
    return function(g["states"][:, :-1], p.frozen(g), _means(p, g), p.labels, **p.options())


def _plain_means(p: Problem, g: Given) -> tuple[Tensor | None, ...]:
    log_p = formulas.logits(*p.teacher(g), temperature=p.batch.temperature).log_softmax(-1)
    probabilities = log_p.exp() * p.batch.mask.unsqueeze(-1)
    weight, bias, *_ = p.frozen(g)
    mean = None if bias is None else probabilities @ bias
    return probabilities @ weight, mean, -(probabilities * log_p).sum(-1)


def _topk(function: Callable[..., Any], p: Problem, g: Given) -> Any:
    return function(*p.student(g), p.ids, p.known, p.labels, tail=p.tail, **p.options())


def _log_q(p: Problem, g: Given) -> Tensor:
    temperature = p.batch.temperature
    return formulas.logits(*p.student(g), temperature=temperature).log_softmax(-1)


def _plain_topk(p: Problem, g: Given) -> Tensor:
    log_q, log_p = _log_q(p, g), p.known.to(g["weight"].dtype)
    of_tokens = log_q.gather(-1, p.ids)
    if p.tail == "renormalize":
        of_tokens, log_p = of_tokens.log_softmax(-1), log_p.log_softmax(-1)
    if p.tail == "bucket":  # all other tokens count as one
        rest = log_q.scatter(-1, p.ids, -torch.inf).logsumexp(-1, keepdim=True)
        rest_of_teacher = torch.log1p(-log_p.exp().sum(-1, keepdim=True))
        of_tokens = torch.cat((of_tokens, rest), -1)
        log_p = torch.cat((log_p, rest_of_teacher), -1)
    found = formulas.divergence(of_tokens, log_p, kind="forward_kl")
    return torch.where(p.batch.mask, found, 0)


def _plain_expectation(p: Problem, g: Given) -> Tensor:
    found = (_log_q(p, g).gather(-1, p.ids).exp() * p.known.to(g["weight"].dtype)).sum(-1)
    return torch.where(p.batch.mask, found, 0)


def _preference(p: Problem, g: Given) -> Tensor:
    p = p.without_ties()
    return fastpref.linear_token_preference(
        *p.student(g), *p.teacher(g), p.labels, beta=0.5, **p.options()
    )


def _plain_preference(p: Problem, g: Given) -> Tensor:
    p = p.without_ties()
    exact = p.leaves(torch.float64, trained=False)
    models = p.teacher(exact), p.student(exact)
    tokens = tuple(formulas.logits(*model).argmax(-1) for model in models)
    return formulas.linear_token_preference(
        p.student(g), p.teacher(g), p.labels, beta=0.5, tokens=tokens, **p.plain()
    )


def _shaping(function: Callable[..., Any], p: Problem, g: Given, **more: Any) -> Tensor:
    if p.potential == "implicit_reward":
        more |= {"reference_hidden": g["reference"], "reference_head": g["of_reference"]}
    return function(
        g["teacher"], g["of_teacher"], p.labels, potential=p.potential, gamma=0.9, **more
    )


def _from_values(
    function: Callable[..., Any], p: Problem, states: Tensor, labels: Tensor, more: Given
) -> Tensor:
    return function(
        states[..., 0], labels, form="next_value", ignore_index=p.batch.ignore_index, **more
    )


def _tvkd(p: Problem) -> dict[str, Any]:
    return {"length_normalize": p.length_normalize, "label_smoothing": 0.1, "sft_weight": 0.5}


def _sums(p: Problem, g: Given) -> Responses:
    hidden, head, labels = p.tokens(g)
    logps = fastpref.linear_logps(hidden, head, labels, **p.scratch())
    more = {**p.boundaries(), "ignore_index": p.batch.ignore_index, "compact": p.compact}
    if not p.packed:
        more["token_weights"] = g["token_weights"]
    return fastpref.sum_responses(logps, labels, **more)


def _plain_sums(p: Problem, g: Given, *, weighted: bool = True) -> Responses:
    """In the dtype in which functions return log-probabilities."""
    logps = formulas.linear_logps(*p.student(g), p.labels, **p.plain())
    logps = logps if logps.dtype == torch.float64 else logps.float()
    lengths, sums = p.batch.mask.sum(-1), logps.sum(-1)
    if p.packed or not weighted:
        return Responses(sums, lengths)
    return Responses((logps * g["token_weights"].to(logps.dtype)).sum(-1), lengths, sums)


def _loss(sums: Callable[[Problem, Given], Responses], p: Problem, g: Given) -> Tensor:
    """The method's loss of responses' sums."""
    parameters, responses = inspect.signature(METHODS[p.method]).parameters, sums(p, g)
    half, numbers = len(p.labels) // 2, iter(("first", "second", "third"))
    if "chosen" in parameters:
        logps, lengths, unweighted = responses
        unweighted = None if unweighted is None else unweighted[:half]
        responses = Responses(logps[:half], lengths[:half], unweighted)
    values = {}
    for name, parameter in list(parameters.items())[1:]:
        if parameter.default is inspect.Parameter.empty:
            halved = name in ("divergences", "advantages") and p.method not in ("tdpo", "dckd")
            number = p.desirable if name == "desirable" else g[next(numbers)]
            values[name] = number[:half] if halved else number
    return METHODS[p.method](responses, **values).loss


class Call(NamedTuple):
    """A function and its formula: tensors, tuples of them, or None where there is none."""

    ours: Function
    plain: Function


# Of those without a gradient.
VALUES = ("linear_stats", "teacher_means", "teacher_shaping")


CALLS: dict[str, Call] = {
    "linear_logps": Call(
        lambda p, g: fastpref.linear_logps(
            *p.student(g), p.labels, **p.scratch()
        ),
        lambda p, g: formulas.linear_logps(*p.student(g), p.labels, **p.plain()),
    ),
    "linear_logps_with_stats": Call(
        lambda p, g: fastpref.linear_logps_with_stats(
            *p.student(g), p.labels, **p.scratch()
        ),
        lambda p, g: _of_student(p, g, p.head(g)),
    ),
    "linear_logsumexp": Call(
        lambda p, g: fastpref.linear_logsumexp(
            g["states"], p.head(g), temperature=p.batch.temperature
        ),
        lambda p, g: formulas.linear_logsumexp(
            g["states"], p.head(g), temperature=p.batch.temperature
        ),
    ),
    "linear_stats": Call(
        lambda p, g: fastpref.linear_stats(
            *p.teacher(g), p.labels, stats=STATS, **p.options()
        ),
        lambda p, g: {
            name: formulas.linear_stats(*p.teacher(g), p.labels, **p.plain())[name]
            for name in STATS
        },
    ),
    "linear_divergence": Call(
        lambda p, g: _divergence(fastpref.linear_divergence, p, g), _plain_of_kind
    ),
    "linear_divergence_with_stats": Call(
        lambda p, g: _divergence(fastpref.linear_divergence_with_stats, p, g),
        lambda p, g: (_plain_of_kind(p, g), *_of_student(p, g, p.head(g))),
    ),
    "linear_cached_kl": Call(
        lambda p, g: _cached(fastpref.linear_cached_kl, p, g), _plain_cached
    ),
    "linear_cached_kl_with_stats": Call(
        lambda p, g: _cached(fastpref.linear_cached_kl_with_stats, p, g),
        lambda p, g: (_plain_cached(p, g), *_of_student(p, g, p.frozen(g))),
    ),
    "teacher_means": Call(_means, _plain_means),
    "linear_topk_divergence": Call(
        lambda p, g: _topk(fastpref.linear_topk_divergence, p, g), _plain_topk
    ),
    "linear_topk_divergence_with_stats": Call(
        lambda p, g: _topk(fastpref.linear_topk_divergence_with_stats, p, g),
        lambda p, g: (_plain_topk(p, g), *_of_student(p, g, p.head(g))),
    ),
    "linear_topk_expectation": Call(
        lambda p, g: fastpref.linear_topk_expectation(
            *p.student(g), p.ids, p.known, p.labels, **p.options()
        ),
        _plain_expectation,
    ),
    "linear_token_preference": Call(_preference, _plain_preference),
    "teacher_shaping": Call(
        lambda p, g: _shaping(fastpref.teacher_shaping, p, g, **p.options()),
        lambda p, g: _shaping(formulas.teacher_shaping, p, g, **p.plain()),
    ),
    "sequence_rewards": Call(
        lambda p, g: fastpref.sequence_rewards(
            *p.states(g), g["reward_head"], **p.boundaries(), ignore_index=p.batch.ignore_index
        ),
        lambda p, g: formulas.sequence_rewards(
            g["states"], p.labels, g["reward_head"], ignore_index=p.batch.ignore_index
        ),
    ),
    "shaping_from_values": Call(
        lambda p, g: _from_values(fastpref.shaping_from_values, p, *p.states(g), p.boundaries()),
        lambda p, g: _from_values(formulas.shaping_from_values, p, g["states"], p.labels, {}),
    ),
    "tvkd_loss": Call(
        lambda p, g: fastpref.tvkd_loss(
            *p.tokens(g), g["first"], ref_logps=g["second"], **_tvkd(p), **p.boundaries(),
            **p.scratch(),
        ).loss,
        lambda p, g: formulas.tvkd_loss(
            *p.student(g), p.labels, g["first"], ref_logps=g["second"],
            **_tvkd(p), **p.plain(),
        ),
    ),
    "drdo_loss": Call(
        lambda p, g: fastpref.drdo_loss(
            *p.tokens(g), g["first"], g["second"], length_normalize=True, **p.boundaries(),
            **p.scratch(),
        ).loss,
        lambda p, g: METHODS["drdo"](
            _plain_sums(p, g, weighted=False), g["first"], g["second"], length_normalize=True
        ).loss,
    ),
    "losses": Call(lambda p, g: _loss(_sums, p, g), lambda p, g: _loss(_plain_sums, p, g)),
}  # fmt: skip
