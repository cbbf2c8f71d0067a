"""Configurations: DPOConfig, and the options of every method, read off the losses' signatures."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from torch import Tensor
from trl.trainer.dpo_config import DPOConfig

from fastpref.checks import (
    NonNegative,
    Positive,
    check_choice,
    check_number,
    check_options,
    refuse,
)
from fastpref.losses import METHODS
from fastpref.responses import Responses
from fastpref.teacher.shaping import Form, Potential, Terminal

# What makes DPO's loss another one. `label_smoothing_factor` is that of transformers' own Trainer.
OF_OTHER_LOSSES = (
    "loss_type",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
    "label_smoothing_factor",
)
OF_REFERENCE = (
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)


class Option(NamedTuple):
    """A keyword of a loss or of a signal, as its signature and its docstring have it."""

    annotation: Any
    default: Any
    help: str

    def kind(self) -> type:
        """The type that a command line reads."""
        if get_origin(self.annotation) is Literal:
            return str
        kind: type = next(iter(get_args(self.annotation)), self.annotation)
        return kind

    def choices(self) -> tuple[str, ...]:
        """What a string may be; empty for numbers and flags."""
        return get_args(self.annotation) if get_origin(self.annotation) is Literal else ()


def shaping_options(
    *,
    potential: Potential = "value",
    value_temperature: Positive = 1.0,
    gamma: NonNegative = 1.0,
    terminal: Terminal = "bootstrap",
    form: Form = "difference",
    precompute_shaping: bool = False,
) -> dict[str, Any]:
    """What `fastpref.teacher_shaping` takes, from the options of methods that read a shaping.

    Args:
        potential: What a state is worth to the teacher.
        value_temperature: Temperature of the teacher's values, in logits.
        gamma: Discount of the teacher's values.
        terminal: The value after the last token: the teacher's own, or zero.
        form: The sum over a response; next_value is what the authors' code trains.
        precompute_shaping: Whether to compute the teacher's shaping of the whole dataset before
            training and let go of the teacher. It then reads its own tokens: any tokenizer will
            do. The result stays in output_dir and is used again.
    """
    if (terminal, form, gamma) == ("zero", "difference", 1.0):
        refuse(
            "terminal",
            "'bootstrap', or a gamma below 1, since 'zero' with gamma=1 gives both responses of a "
            "pair the same shaping",
            repr(terminal),
        )
    return {
        "potential": potential,
        "temperature": value_temperature,
        "gamma": gamma,
        "terminal": terminal,
        "form": form,
    }


def reference_options(*, reference_free: bool = True) -> bool:
    """Whether a method whose reference is optional does without one.

    Args:
        reference_free: Whether the loss does without a reference model. If False, a reference is
            used as in DPOTrainer: ref_model, or the checkpoint that the student was loaded from,
            or the student with its PEFT adapter off.
    """
    return reference_free


def inputs_of(method: str) -> dict[str, bool]:
    """What a loss reads of a batch, by the names of its parameters, and whether it has to."""
    loss = METHODS[method]
    hints = get_type_hints(loss)
    return {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in inspect.signature(loss).parameters.items()
        if hints[name] in (Responses, Tensor, Tensor | None)
    }


def options_of_method(method: str) -> dict[str, Option]:
    """The options of a method: those of its loss, and of the signals that the loss reads."""
    inputs = inputs_of(method)
    options = _options(METHODS[method])
    if "shaping" in inputs:
        options |= _options(shaping_options)
    if inputs.get("ref_logps") is False:
        options |= _options(reference_options)
    return options


def _options(function: Callable[..., Any]) -> dict[str, Option]:
    hints = get_type_hints(function, include_extras=True)
    parts = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", parts[2].partition("\n\n")[0], re.M)
    helps = {name: re.sub(r"\s+", " ", text).replace("``", "") for name, text in entries}
    return {
        name: Option(hints[name], parameter.default, helps[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if hints[name] not in (Responses, Tensor, Tensor | None)
    }


OPTIONS = {method: options_of_method(method) for method in METHODS}


def _field(name: str) -> tuple[str, Any, Any]:
    """An option of one method or of several, as a field that is None where it is not set."""
    owners = {method: options[name] for method, options in OPTIONS.items() if name in options}
    texts: dict[str, list[str]] = {}
    for method, option in owners.items():
        texts.setdefault(f"{option.help} Default: {option.default}.", []).append(method)
    help_text = " ".join(f"[{', '.join(methods)}] {text}" for text, methods in texts.items())
    metadata: dict[str, Any] = {"help": help_text.replace("%", "%%")}
    kind = next(iter(owners.values())).kind()
    choices = [choice for option in owners.values() for choice in option.choices()]
    if choices:
        metadata["choices"] = list(dict.fromkeys(choices))
    if kind is bool:  # a flag may stand alone on a command line
        metadata |= {"nargs": "?", "const": True}
    return name, kind | None, field(default=None, metadata=metadata)


_DPOConfigWithOptions: Any = make_dataclass(
    "_DPOConfigWithOptions",
    [_field(name) for name in dict.fromkeys(name for found in OPTIONS.values() for name in found)],
    bases=(DPOConfig,),
)


@dataclass
class PreferenceConfig(_DPOConfigWithOptions):  # type: ignore[misc]  # made above
    """DPOConfig, the name of a method, and the options of all methods.

    An option is what the function `fastpref.losses.<method>` says of it, and has that function's
    default where it is not set. Methods that read a teacher's shaping also have those of
    `fastpref.teacher_shaping`: ``potential``, ``value_temperature`` (its ``temperature``),
    ``gamma``, ``terminal``, ``form``, and ``precompute_shaping``; methods with an optional
    reference have ``reference_free=True``. Refused are options that the method does not have,
    values out of range, and options of DPOConfig that choose another loss.

    Example:
        >>> from fastpref.integrations.trl import PreferenceConfig
        >>> args = PreferenceConfig("student-ipo", method="ipo", beta=0.2, use_cpu=True, bf16=False)
        >>> args.beta, args.length_normalize, args.alpha
        (0.2, True, None)
    """

    method: str = field(
        default="dpo",
        metadata={"help": "Which loss of fastpref.losses to train.", "choices": list(METHODS)},
    )
    scratch_bytes: int = field(
        default=0,
        metadata={
            "help": "Bytes that a trained head may use to keep exponentials for its backward pass "
            "instead of computing them again."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle()

    @classmethod
    def of(cls, args: Any) -> Self:
        """``args`` where they are a configuration of ours; a plain DPOConfig with our fields added.

        A field of DPOConfig that has its default counts as not set, for methods with another.
        """
        if isinstance(args, PreferenceConfig):
            if cls is not PreferenceConfig and cls.method != args.method:
                refuse("args", f"method={cls.method!r}", repr(args.method))
            return args  # type: ignore[return-value]  # whose method is that of cls
        if not isinstance(args, DPOConfig):
            refuse("args", f"a {cls.__name__} or a DPOConfig", type(args).__name__)
        found = cls.__new__(cls)
        found.__dict__.update(vars(args))  # as it is: nothing that DPOConfig set up is done twice
        theirs = _defaults(args)
        for name, default in _defaults(found).items():
            if name not in theirs or (default is None and getattr(args, name) == theirs[name]):
                setattr(found, name, default)
        found._settle()
        return found

    def options(self) -> dict[str, Any]:
        """What the loss takes beside what it reads of a batch."""
        return {name: getattr(self, name) for name in _options(METHODS[self.method])}

    def shaping_options(self) -> dict[str, Any]:
        """What `fastpref.teacher_shaping` takes."""
        return shaping_options(**{name: getattr(self, name) for name in _options(shaping_options)})

    def has_reference(self) -> bool:
        """Whether the loss reads the log-probabilities of a reference."""
        inputs = inputs_of(self.method)
        return "ref_logps" in inputs and not getattr(self, "reference_free", None)

    def refuse_set(self, names: Iterable[str], reason: str) -> None:
        """Refuse options that were set to something else than their default."""
        defaults = _defaults(self) | {
            name: option.default for name, option in OPTIONS[self.method].items()
        }
        for name in names:
            if getattr(self, name) != defaults[name]:
                refuse(name, f"{defaults[name]!r}, since {reason}", repr(getattr(self, name)))

    def _settle(self) -> None:
        """Give the method's options their values, and refuse what it has no use for."""
        check_choice("method", self.method, tuple(METHODS))
        options = OPTIONS[self.method]
        for name in {name for found in OPTIONS.values() for name in found}:
            if name not in options and getattr(self, name) is not None:
                refuse(
                    name, f"None, since method {self.method!r} has no such option",
                    repr(getattr(self, name)),
                )  # fmt: skip
        for name, option in options.items():
            if getattr(self, name) is None:
                setattr(self, name, option.default)
            if option.choices():
                check_choice(name, getattr(self, name), option.choices())
        check_number("scratch_bytes", self.scratch_bytes, at_least=0)
        check_options(METHODS[self.method], vars(self))
        self.refuse_set(OF_OTHER_LOSSES, f"method {self.method!r} has a loss of its own")
        if "shaping" in inputs_of(self.method):
            check_options(shaping_options, vars(self))
            self.shaping_options()
            if self.precompute_shaping:
                self.refuse_set(["truncation_mode"], "a teacher's own tokens are cut at their end")
        if not self.has_reference():
            self.refuse_set(OF_REFERENCE, "there is no reference")
            # DPOTrainer loads a reference unless its numbers are said to be there.
            self.precompute_ref_log_probs = True


def _defaults(args: Any) -> dict[str, Any]:
    return {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(args)
    }


@dataclass
class TVKDConfig(PreferenceConfig):
    """`PreferenceConfig` with ``method="tvkd"``; see `fastpref.losses.tvkd` for its options.

    ``beta``, ``alpha``, ``length_normalize``, ``label_smoothing`` and ``sft_weight`` are the
    loss's. ``reference_free=True`` is the paper's; with False and ``alpha=0`` it is DPO.
    """

    method: str = field(default="tvkd", init=False)


@dataclass
class DRDOConfig(PreferenceConfig):
    """`PreferenceConfig` with ``method="drdo"``; see `fastpref.losses.drdo` for its options.

    They are ``alpha``, ``gamma``, ``length_normalize`` and ``detach_focal``. DRDO has no reference,
    no ``beta`` and no ``label_smoothing``.
    """

    method: str = field(default="drdo", init=False)


@dataclass
class OracleConfig(PreferenceConfig):
    """`PreferenceConfig` with ``method="oracle"``, whose one option is ``sft_weight``."""

    method: str = field(default="oracle", init=False)
