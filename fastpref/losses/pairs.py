"""What losses of pairs share: checks of their arguments, and what they return."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_type_hints

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.checks import (
    check_annotated,
    check_device,
    check_floating,
    check_shape,
    options_of,
    refuse,
)
from fastpref.responses import Responses

# Every method by its name; `pair_loss` adds them.
METHODS: dict[str, Callable[..., Any]] = {}
Parameters = ParamSpec("Parameters")
Output = TypeVar("Output")


class LossOutput(NamedTuple):
    """What losses of pairs return; everything but ``loss`` is detached."""

    loss: Tensor  # () mean over pairs, differentiable
    chosen_logps: Tensor  # (B,) summed log-probabilities, nats
    rejected_logps: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,) the rewards that the policy implies, in the unit of the loss
    rejected_rewards: Tensor  # (B,)
    nll_loss: Tensor  # () mean negative log-probability of the chosen tokens, nats


def pair_loss(loss: Callable[Parameters, Output]) -> Callable[Parameters, Output]:
    """Make a function a method: it is registered by its name, and its arguments are checked.

    Its first argument is `Responses`, of all 2B responses or, called ``chosen``, of the chosen
    ones alone. Tensors are (2B,) and cast to its dtype; numbers and flags are held to their
    annotations.
    """
    names = tuple(inspect.signature(loss).parameters)
    options = options_of(loss)
    hints = get_type_hints(loss)
    tensors = {name for name in names if hints[name] in (Tensor, Tensor | None)}

    @functools.wraps(loss)
    def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Output:
        given: dict[str, Any] = {**dict(zip(names, arguments, strict=False)), **named}
        check_annotated(options, given)
        logps, sequences = _check_responses(names[0], given.get(names[0]))

        def ready(name: str, value: Any) -> Any:
            if name not in tensors or value is None:
                return value
            check_floating(name, value)
            check_shape(name, value, (sequences,), "(2B,), one number per response")
            check_device(name, value, names[0], logps)
            return value.to(logps.dtype)

        positional = [ready(name, value) for name, value in zip(names, arguments, strict=False)]
        positional += arguments[len(names) :]  # one too many, which the loss refuses itself
        return loss(*positional, **{name: ready(name, value) for name, value in named.items()})

    METHODS[loss.__name__] = call
    return call


def _check_responses(name: str, responses: Any) -> tuple[Tensor, int]:
    """The log-probabilities of `Responses`, and the number of responses of all pairs, 2B."""
    if not isinstance(responses, Responses):
        refuse(name, "Responses, from sum_responses", type(responses).__name__)
    (count,) = responses.logps.shape
    if name == "chosen":
        count *= 2
    if not count or count % 2:
        refuse(name, "2B responses, chosen ones first and as many rejected after them", count)
    return responses.logps, count


def pair_output(
    losses: Tensor,  # (B,)
    responses: Responses,
    rewards: Tensor,  # (2B,)
    sft_weight: float = 0.0,
) -> LossOutput:
    """The mean of the pairs' losses, the likelihood of the chosen tokens added with its weight."""
    nll_loss = responses.chosen_nll()
    loss = losses.mean()
    if sft_weight:
        loss = loss + sft_weight * nll_loss
    return LossOutput(
        loss, *halves(responses.likelihoods()), *halves(rewards), nll_loss=nll_loss.detach()
    )


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """What a metric reads of (2B,) numbers: chosen and rejected ones (B,), detached."""
    chosen, rejected = values.detach().chunk(2)
    return chosen, rejected


def difference(values: Tensor) -> Tensor:
    """Chosen minus rejected: (2B,) to (B,)."""
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def preference_losses(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry losses of ``margins`` (B,), as cDPO smooths them: (B,)."""
    losses = -logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-margins)
    return losses


def log_ratios(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """Log-probabilities (2B,) relative to a reference's, where there is one."""
    return logps if ref_logps is None else logps - ref_logps
