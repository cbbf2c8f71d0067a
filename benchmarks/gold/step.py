"""The loss of one batch: fastpref's own, of the arguments that its signature asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from methods import Method
from models import Decoder, labels_of, responses_of
from signals import Networks
from torch import Tensor
from world import World

from fastpref import (
    Responses,
    linear_divergence,
    linear_stats,
    linear_token_preference,
    losses,
    sequence_rewards,
    sum_responses,
)


class Batch(NamedTuple):
    """What a loss may read of S responses, the first side's before the second's."""

    world: World
    method: Method
    student: Decoder
    networks: Networks
    sequences: Tensor  # (S, L)
    labels: Tensor  # (S, L - 1)
    hidden: Tensor  # (S, L, H) of the student
    responses: Responses  # by the student
    signals: Mapping[str, Tensor]  # of `signals_of`


def batch_loss(
    method: Method,
    options: Mapping[str, Any],
    student: Decoder,
    networks: Networks,
    sequences: Tensor,
    signals: Mapping[str, Tensor],
    world: World,
) -> Tensor:
    """The loss of a method with these options, differentiable."""
    labels, hidden = labels_of(sequences, world.prompt_length), student(sequences)
    responses = responses_of(student, hidden, labels)
    batch = Batch(world, method, student, networks, sequences, labels, hidden, responses, signals)
    loss = losses.METHODS[method.loss]
    wanted = [name for name in inspect.signature(loss).parameters if name in READ]
    tensors = {name: READ[name](batch) for name in wanted if name not in options}
    found: Tensor = loss(responses, **tensors, **options).loss
    return found


def _signal(argument: str, usual: str) -> Callable[[Batch], Tensor]:
    return lambda batch: batch.signals[str(batch.method.signals.get(argument, usual))]


def _oracle_rewards(batch: Batch) -> Tensor:
    name = batch.method.signals.get("oracle_rewards", "oracle_reward")
    if name == "student_reward":
        return _student_rewards(batch).detach()
    if isinstance(name, str):
        return batch.signals[name]
    return torch.stack([batch.signals[each] for each in name])


def _divergences(batch: Batch, rows: slice = slice(None)) -> Tensor:
    """(S,) sums over responses."""
    compared, options = batch.method.compared, dict(batch.method.divergence)
    compare: Callable[..., Tensor] = linear_divergence
    if options["kind"] == "token_preference":
        del options["kind"]
        compare = linear_token_preference
    elif options["kind"] == "advantage":
        options["reference_hidden"] = batch.signals["teacher_sft_states"][rows, :-1]
        options["reference_head"] = batch.networks.teacher_sft.head()
    labels = batch.labels[rows]
    divergences = compare(
        batch.hidden[rows, :-1],
        batch.student.head(),
        batch.signals[f"{compared}_states"][rows, :-1],
        getattr(batch.networks, compared).head(),
        labels,
        **options,
    )
    return sum_responses(divergences, labels).logps


def _advantages(batch: Batch) -> Tensor:
    """(B,) of the second side."""
    return _divergences(batch, slice(len(batch.labels) // 2, None))


def _student_rewards(batch: Batch) -> Tensor:
    return sequence_rewards(batch.hidden, batch.labels, batch.student.reward_head.weight)


def _desirable(batch: Batch) -> Tensor:
    return torch.arange(len(batch.labels)) < len(batch.labels) // 2


@torch.no_grad()
def _log_weights(batch: Batch) -> Tensor:
    """WPO's: how likely the student is to write a response."""
    found = linear_stats(
        batch.hidden[:, :-1],
        batch.student.head(),
        batch.labels,
        stats=("target_logp", "log_sum_squared_probs"),
    )
    sums = sum_responses(found["target_logp"] - found["log_sum_squared_probs"], batch.labels)
    return sums.per_token(sums.logps)


@torch.no_grad()
def _mismatched(batch: Batch) -> Tensor:
    """KTO's: log-ratios of responses behind the prompts of others."""
    length = batch.world.prompt_length
    prompts, answers = batch.sequences[:, :length], batch.sequences[:, length:]
    sequences = torch.cat([prompts, answers.roll(1, 0)], 1)
    labels = labels_of(sequences, length)
    student, reference = (
        responses_of(model, model(sequences), labels).logps
        for model in (batch.student, batch.networks.reference)
    )
    return student - reference


READ: dict[str, Callable[[Batch], Tensor]] = {  # by the argument of a loss
    "ref_logps": _signal("ref_logps", "reference_logps"),
    "teacher_logps": _signal("teacher_logps", "teacher_logps"),
    "shaping": _signal("shaping", "value"),
    "oracle_rewards": _oracle_rewards,
    "student_rewards": _student_rewards,
    "divergences": _divergences,
    "advantages": _advantages,
    "log_weights": _log_weights,
    "desirable": _desirable,
    "kl_log_ratios": _mismatched,
}
