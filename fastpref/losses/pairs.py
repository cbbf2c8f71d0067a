"""What losses share: checks of their arguments, and what those of pairs return."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast, get_args, get_type_hints

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.checks import (
    check_annotated,
    check_device,
    check_flags,
    check_floating,
    check_shape,
    options_of,
    refuse,
)
from fastpref.ops.backend import uses_triton
from fastpref.responses import Responses, Tokens

# Every method by its name; `pair_loss` and `unpaired_loss` add them.
METHODS: dict[str, Callable[..., Any]] = {}
WITH_KERNEL = ("drdo", "tvkd")  # what `fastpref.losses.fused` has
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
Parameters = ParamSpec("Parameters")
Output = TypeVar("Output")


class LossOutput(NamedTuple):
    """What losses of pairs return; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over pairs, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    rejected_logps: Tensor  #: (B,)
    chosen_rewards: Tensor  #: (B,) the rewards that the policy implies, in the unit of the loss
    rejected_rewards: Tensor  #: (B,)
    nll_loss: Tensor  #: () mean negative log-probability of the chosen tokens, nats


class Shape(NamedTuple):
    """The annotation of a tensor that is not one floating-point number per response."""

    words: str
    fits: Callable[[tuple[int, ...], int], bool]  # of its shape and the number of responses
    flags: bool = False


def pair_loss(
    loss: Callable[Concatenate[Responses, Parameters], Output],
) -> Callable[Concatenate[Responses | Tokens, Parameters], Output]:
    """Make a function a method: it is registered by its name, and its arguments are checked.

    Its first argument is `Responses`, of all 2B responses or, called ``chosen``, of the chosen
    ones alone. Other tensors are (2B,), or what their `Shape` says, and are cast to the dtype of
    the log-probabilities. Options must keep to their annotations. In place of `Responses` it also
    takes `Tokens`, which a Triton kernel sums if the method has one, and `Tokens.sums` otherwise.
    """
    return _method(loss, paired=True)


def unpaired_loss(
    loss: Callable[Concatenate[Responses, Parameters], Output],
) -> Callable[Concatenate[Responses | Tokens, Parameters], Output]:
    """`pair_loss` for a loss of S responses that make no pairs; other tensors are (S,)."""
    return _method(loss, paired=False)


def _method(
    loss: Callable[Concatenate[Responses, Parameters], Output], *, paired: bool
) -> Callable[Concatenate[Responses | Tokens, Parameters], Output]:
    parameters = inspect.signature(loss).parameters
    first, *names = parameters
    positional = [name for name in names if parameters[name].kind != KEYWORD_ONLY]
    hints, annotations = get_type_hints(loss), get_type_hints(loss, include_extras=True)
    each = "(2B,), one number per response" if paired else "(S,), one number per response"
    tensors = {
        name: next((one for one in get_args(annotations[name]) if isinstance(one, Shape)), each)
        for name in names
        if hints[name] in (Tensor, Tensor | None)
    }
    options = options_of(loss)
    defaults = {name: parameters[name].default for name in (*options, *tensors)}

    @functools.wraps(loss)
    def call(
        responses: Responses | Tokens, /, *arguments: Parameters.args, **named: Parameters.kwargs
    ) -> Output:
        given: dict[str, Any] = {**dict(zip(positional, arguments, strict=False)), **named}
        if len(given) < len(arguments) + len(named):  # too many, or one twice: Python says so
            return loss(cast(Responses, responses), *arguments, **named)
        count = _check_responses(first, responses, paired)
        given = check_annotated(options, given)
        for name, shape in tensors.items():
            if name in given and (given[name] is not None or hints[name] is Tensor):
                given[name] = _ready(name, given[name], responses.logps, count, shape)
        if isinstance(responses, Tokens):
            if _has_kernel(loss.__name__, responses, given, but=next(iter(names), "")):
                from fastpref.losses.fused import FUSED

                return FUSED[loss.__name__](responses, **{**defaults, **given})  # type: ignore[no-any-return]  # as the loss
            responses = responses.sums()
        return cast(Callable[..., Output], loss)(responses, **given)

    METHODS[loss.__name__] = call
    return call


def _check_responses(name: str, responses: Any, paired: bool) -> int:
    """The number of responses, for pairs 2B; refused is what is no `Responses` of so many."""
    if not isinstance(responses, Responses | Tokens):
        refuse(name, "Responses, from sum_responses", type(responses).__name__)
    if isinstance(responses, Responses):
        check_floating("logps", responses.logps)
        if responses.logps.dim() != 1:
            refuse("logps", "shape (S,), one number per response", tuple(responses.logps.shape))
        for field, values in responses._asdict().items():
            if values is not None:
                check_shape(field, values, responses.logps.shape, "(S,), one number per response")
    count: int = responses.sequences() * (2 if paired and name == "chosen" else 1)
    if paired and (not count or count % 2):
        refuse(name, "2B responses, chosen ones first and as many rejected after them", count)
    if not count:
        refuse(name, "at least one response", count)
    return count


def _ready(name: str, values: Any, logps: Tensor, count: int, shape: Shape | str) -> Tensor:
    """A tensor of its shape, (count,) if that is words, in the dtype of the log-probabilities."""
    flags = isinstance(shape, Shape) and shape.flags
    if flags:
        check_flags(name, values)
    else:
        check_floating(name, values)
    if isinstance(shape, str):
        check_shape(name, values, (count,), shape)
    elif not shape.fits(tuple(values.shape), count):
        refuse(name, f"shape {shape.words}", tuple(values.shape))
    check_device(name, values, "labels", logps)
    return cast(Tensor, values if flags else values.to(logps.dtype))


def _has_kernel(method: str, tokens: Tokens, given: dict[str, Any], *, but: str) -> bool:
    """Whether a Triton kernel serves a call: it has no gradients of tensors ``but`` of one."""
    if method not in WITH_KERNEL or not uses_triton(tokens.logps):
        return False
    constants = [tokens.token_weights, *(value for name, value in given.items() if name != but)]
    return not any(isinstance(one, Tensor) and one.requires_grad for one in constants)


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


def margins(values: Tensor) -> Tensor:
    """Chosen minus rejected: (2B,) to (B,)."""
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def preference_losses(differences: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry losses of `margins` (B,), as cDPO smooths them: (B,)."""
    losses = -logsigmoid(differences)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-differences)
    return losses
