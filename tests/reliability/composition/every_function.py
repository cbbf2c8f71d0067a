"""Every public function on one small batch, by name: what the tests beside this go through."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import Head
from fastpref.losses import METHODS

# Tensors by name; also "transform", of the head, and "options", of every function with a head.
Given = dict[str, Any]

LABELS = torch.tensor([[1, 2, 3], [-100, 4, -100], [5, -100, 6], [-100, 7, 8]])
WIDTH, VOCAB = 8, 20


def batch(
    *,
    trains: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    labels: Tensor = LABELS,
    width: int = WIDTH,
    vocab: int = VOCAB,
) -> Given:
    """Four responses of up to three labels, the same ones whenever asked; some want a gradient."""
    random, (rows, length) = torch.Generator().manual_seed(5), labels.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    ids = torch.rand(rows, length, vocab, generator=random).argsort(-1)[..., :4]
    found = {
        "hidden": normal(rows, length, width), "weight": normal(vocab, width),
        "bias": normal(vocab), "states": normal(rows, length + 1, width),
        "teacher": normal(rows, length, 6), "of_teacher": normal(vocab, 6),
        "means": normal(rows, length, width), "mean_bias": normal(rows, length),
        "entropy": normal(rows, length).abs(), "ids": ids,
        "known": normal(rows, length, vocab).log_softmax(-1)[..., :4], "labels": labels.clone(),
        "shaping": normal(rows), "rewards": normal(rows), "oracle": normal(rows),
        "values": normal(rows, length + 1), "reward_head": normal(1, width),
        "logps": -normal(rows, length).abs(),
    }  # fmt: skip
    for name in trains:
        found[name].requires_grad_()
    return found


def head(given: Given) -> Head:
    return Head(given["weight"], given["bias"], **given.get("transform", {"softcap": 30.0}))


def _options(given: Given) -> dict[str, float]:
    return given.get("options", {})


def _plain_head(given: Given) -> Head:
    return Head(given["weight"], given["bias"])


def _means(given: Given) -> fastpref.TeacherMeans:
    return fastpref.TeacherMeans(given["means"], given["mean_bias"], given["entropy"])


def _teacher(given: Given) -> tuple[Tensor, Tensor]:
    return given["teacher"], given["of_teacher"]


Function = Callable[[Given, bool], Any]  # of a batch, and of ``compact``

# Those with a gradient, of which the head may train.
TRAINED: dict[str, Function] = {
    "linear_logps": lambda given, compact: fastpref.linear_logps(
        given["hidden"], head(given), given["labels"], compact=compact, **_options(given)
    ),
    "linear_logps_with_stats": lambda given, compact: fastpref.linear_logps_with_stats(
        given["hidden"], head(given), given["labels"], compact=compact, **_options(given)
    ),
    "linear_logsumexp": lambda given, _: fastpref.linear_logsumexp(
        given["hidden"], head(given), **_options(given)
    ),
    "linear_divergence": lambda given, compact: fastpref.linear_divergence(
        given["hidden"], head(given), *_teacher(given), given["labels"], kind="jsd",
        compact=compact, **_options(given),
    ),
    "linear_divergence_with_stats": lambda given, compact: fastpref.linear_divergence_with_stats(
        given["hidden"], head(given), *_teacher(given), given["labels"], kind="reverse_kl",
        compact=compact, **_options(given),
    ),
    "linear_topk_divergence": lambda given, compact: fastpref.linear_topk_divergence(
        given["hidden"], head(given), given["ids"], given["known"], given["labels"],
        compact=compact, **_options(given),
    ),
    "linear_topk_divergence_with_stats": lambda given, compact: (
        fastpref.linear_topk_divergence_with_stats(
            given["hidden"], head(given), given["ids"], given["known"], given["labels"],
            compact=compact, **_options(given),
        )
    ),
    "linear_topk_expectation": lambda given, compact: fastpref.linear_topk_expectation(
        given["hidden"], head(given), given["ids"], given["known"], given["labels"],
        compact=compact, **_options(given),
    ),
    "linear_token_preference": lambda given, compact: fastpref.linear_token_preference(
        given["hidden"], head(given), *_teacher(given), given["labels"],
        compact=compact, **_options(given),
    ),
    "tvkd_loss": lambda given, compact: fastpref.tvkd_loss(
        given["hidden"], head(given), given["labels"], given["shaping"],
        compact=compact, **_options(given),
    ),
    "drdo_loss": lambda given, compact: fastpref.drdo_loss(
        given["hidden"], head(given), given["labels"], given["rewards"], given["oracle"],
        length_normalize=True, compact=compact, **_options(given),
    ),
}  # fmt: skip
# Those of which it may not.
FROZEN: dict[str, Function] = {
    "linear_cached_kl": lambda given, compact: fastpref.linear_cached_kl(
        given["hidden"], _plain_head(given), _means(given), given["labels"],
        compact=compact, **_options(given),
    ),
    "linear_cached_kl_with_stats": lambda given, compact: fastpref.linear_cached_kl_with_stats(
        given["hidden"], _plain_head(given), _means(given), given["labels"],
        compact=compact, **_options(given),
    ),
}  # fmt: skip
# Those without a gradient.
VALUES: dict[str, Function] = {
    "linear_stats": lambda given, compact: fastpref.linear_stats(
        given["hidden"], head(given), given["labels"],
        stats=["logsumexp", "margin", "expected_logit", "target_logp", "is_top1"],
        compact=compact, **_options(given),
    ),
    "teacher_means": lambda given, compact: fastpref.teacher_means(
        *_teacher(given), _plain_head(given), given["labels"], compact=compact, **_options(given)
    ),
    "teacher_shaping": lambda given, compact: fastpref.teacher_shaping(
        given["states"], head(given), given["labels"], compact=compact, **_options(given)
    ),
}  # fmt: skip
# Those that read no vocabulary: plain PyTorch.
PLAIN: dict[str, Function] = {
    "sum_responses": lambda given, compact: fastpref.sum_responses(
        given["logps"], given["labels"], compact=compact
    ),
    "sequence_rewards": lambda given, _: fastpref.sequence_rewards(
        given["states"], given["labels"], given["reward_head"]
    ),
    "shaping_from_values": lambda given, _: fastpref.shaping_from_values(
        given["values"], given["labels"]
    ),
}
HEADED = TRAINED | FROZEN | VALUES
EVERY = HEADED | PLAIN
# Of those with a gradient, whether the head trains; likewise.
WITH_GRADIENT = [*((name, True) for name in TRAINED), *((name, False) for name in TRAINED | FROZEN)]


# What a loss has of the chosen responses alone.
OF_CHOSEN = ("divergences", "advantages")


def loss_batch(method: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Log-probabilities and lengths of responses, and what else a loss of two pairs takes."""
    random = torch.Generator().manual_seed(5)
    parameters = inspect.signature(METHODS[method]).parameters
    count = 2 if "chosen" in parameters else 4
    given: dict[str, Any] = {"sft_weight": 0.5} if "sft_weight" in parameters else {}
    for name, parameter in list(parameters.items())[1:]:
        if parameter.default is inspect.Parameter.empty:
            size = 2 if name in OF_CHOSEN and method not in ("tdpo", "dckd") else 4
            values = torch.randn(size, dtype=dtype, generator=random)
            given[name] = values > 0 if name == "desirable" else values
    logps = -torch.rand(count, dtype=dtype, generator=random) - 0.5
    return (logps, torch.tensor([3, 1, 2, 4])[:count]), given


def leaves_of(trained: bool) -> tuple[str, ...]:
    return ("hidden", "weight", "bias") if trained else ("hidden",)


def flat(found: Any) -> list[Tensor]:
    """All tensors that a function returns."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = tuple(found.values())
    return [tensor for one in found if one is not None for tensor in flat(one)]


def total(found: Any) -> Tensor:
    """One number, of everything with a gradient: of squares, so that gradients depend on it."""
    with_gradient = [one for one in flat(found) if one.requires_grad]
    return torch.stack([one.square().sum() for one in with_gradient]).sum()


def gradients(given: Given, loss: Tensor, **options: bool) -> list[Tensor]:
    wanted = [one for one in given.values() if isinstance(one, Tensor) and one.requires_grad]
    return list(torch.autograd.grad(loss, wanted, **options))


def run(name: str, trained: bool | None, compact: bool = True) -> list[Tensor]:
    """What a function returns, and with ``trained`` not None its gradients."""
    if trained is None:
        with torch.no_grad():
            return flat(EVERY[name](batch(), compact))
    given = batch(trains=leaves_of(trained))
    found = EVERY[name](given, compact)
    return [*(one.detach() for one in flat(found)), *gradients(given, total(found))]


# A function's name and its ``trained``: each way to call it.
WAYS = [*WITH_GRADIENT, *((name, None) for name in EVERY)]


def same_bits(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether two lists of tensors are alike to the last bit; NaN is like NaN."""
    return all(
        one.dtype == other.dtype
        and torch.equal(one.isnan(), other.isnan())
        and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(found, expected, strict=True)
    )
