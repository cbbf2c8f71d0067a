"""Configurations: DPOConfig, and the options of every method, read off the losses' signatures."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from torch import Tensor
from trl.trainer.dpo_config import DPOConfig

from fastpref.checks import (
    NonNegative,
    Positive,
    check_choice,
    check_options,
    check_scratch_bytes,
    refuse,
)
from fastpref.losses import METHODS
from fastpref.responses import Responses
from fastpref.teacher.precompute import ShapingOptions
from fastpref.teacher.shaping import Form, Potential, Terminal, check_signal

# What makes DPO's loss another one. `label_smoothing_factor` is that of transformers' own Trainer.
OF_OTHER_LOSSES = (
    "loss_type loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting "
    "discopop_tau label_smoothing_factor"
).split()
OF_REFERENCE = (
    "precompute_ref_batch_size sync_ref_model ref_model_mixup_alpha ref_model_sync_steps".split()
)
INPUTS = (Responses, Tensor, Tensor | None)  # annotations of what a loss reads of a batch
# What trainers give a loss of it.
GIVEN = "responses chosen ref_logps shaping oracle_rewards rewards student_rewards".split()


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
    check_signal(terminal, form, gamma)
    return ShapingOptions(potential, value_temperature, gamma, terminal, form)._asdict()


def reference_options(*, reference_free: bool = True) -> bool:
    """Whether a method whose reference is optional does without one.

    Args:
        reference_free: Whether the loss does without a reference model. If False, a reference is
            used as in DPOTrainer: ref_model, or the checkpoint that the student was loaded from,
            or the student with its PEFT adapter off.
    """
    return reference_free


@functools.cache
def inputs_of(method: str) -> dict[str, bool]:
    """What a loss reads of a batch, by the names of its parameters, and whether it has to."""
    parameters = inspect.signature(METHODS[method], eval_str=True).parameters.values()
    inputs = [one for one in parameters if _is_input(one)]
    return {one.name: one.default is inspect.Parameter.empty for one in inputs}


def _is_input(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is read of a batch, whatever its shape."""
    annotation = parameter.annotation
    if get_origin(annotation) is Annotated:
        annotation = annotation.__origin__
    return annotation in INPUTS


@functools.cache
def _options(*functions: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that are no inputs, by name."""
    signatures = [inspect.signature(function, eval_str=True) for function in functions]
    parameters = [one for signature in signatures for one in signature.parameters.values()]
    return {one.name: one for one in parameters if not _is_input(one)}


def _sources(method: str) -> list[Callable[..., Any]]:
    """The functions whose keywords are a method's options: its loss, and what it reads."""
    inputs = inputs_of(method)
    sources = [METHODS[method]]
    if "shaping" in inputs:
        sources.append(shaping_options)
    if inputs.get("ref_logps") is False:
        sources.append(reference_options)
    return sources


def _help(name: str, function: Callable[..., Any]) -> str:
    """What the docstring of a function says of an argument, and its default."""
    doc = inspect.getdoc(function) or ""
    found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", doc.partition("Args:\n")[2], re.M)
    text = "" if found is None else re.sub(r"\s+", " ", found[1]).replace("``", "")
    return f"{text} If not set: {_options(function)[name].default}."


def _choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _field(name: str) -> tuple[str, Any, Any]:
    """An option of one method or of several, as a field that is None where it is not set."""
    owners: dict[str, list[str]] = {}  # methods by help text
    annotations = []
    for method in METHODS:
        for function in _sources(method):
            if name in _options(function):
                owners.setdefault(_help(name, function), []).append(method)
                annotations.append(_options(function)[name].annotation)
    texts = (f"[{', '.join(methods)}] {text}" for text, methods in owners.items())
    metadata: dict[str, Any] = {"help": " ".join(texts).replace("%", "%%")}
    choices = dict.fromkeys(choice for one in annotations for choice in _choices(one))
    kind = str if choices else next(iter(get_args(annotations[0])), annotations[0])
    if choices:
        metadata["choices"] = list(choices)
    if kind is bool:  # a flag may stand alone on a command line
        metadata |= {"nargs": "?", "const": True}
    return name, kind | None, field(default=None, metadata=metadata)


OF_SHAPING = list(_options(shaping_options))
OPTIONS = {method: _options(*_sources(method)) for method in METHODS}
ALL_OPTIONS = list(dict.fromkeys(name for options in OPTIONS.values() for name in options))
_DPOConfigWithOptions: Any = make_dataclass(
    "_DPOConfigWithOptions", map(_field, ALL_OPTIONS), bases=(DPOConfig,)
)


@dataclass
class PreferenceConfig(_DPOConfigWithOptions):  # type: ignore[misc]  # made above
    """DPOConfig, the name of a method, and the options of all methods.

    An option is what the function `fastpref.losses.<method>` says of it, and has that function's
    default where it is not set. Methods that read a teacher's shaping also have
    ``precompute_shaping`` and the options of `fastpref.teacher_shaping`, whose ``temperature`` is
    ``value_temperature``; methods with an optional reference have ``reference_free``. Refused are
    options that the method does not have, values out of range, and another loss of DPOConfig.

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
    scratch_bytes: int | None = field(
        default=None,
        metadata={
            "help": "The most bytes that a trained head keeps for its backward pass instead of "
            "computing them again; by default what the batch needs, up to 1 GiB."
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
            return args
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
        return shaping_options(**{name: getattr(self, name) for name in OF_SHAPING})

    def has_reference(self) -> bool:
        """Whether the loss reads the log-probabilities of a reference."""
        return "ref_logps" in inputs_of(self.method) and not self.reference_free

    def refuse_set(self, names: Iterable[str], reason: str) -> None:
        """Refuse options that were set to something else than their default."""
        defaults = _defaults(self)
        defaults |= {name: option.default for name, option in OPTIONS[self.method].items()}
        for name in names:
            if getattr(self, name) != defaults[name]:
                refuse(name, f"{defaults[name]!r}, since {reason}", repr(getattr(self, name)))

    def _settle(self) -> None:
        """Give the method's options their values, and refuse what it has no use for."""
        check_choice("method", self.method, tuple(OPTIONS))
        if absent := [name for name in inputs_of(self.method) if name not in GIVEN]:
            what = f"a method of which a trainer has all inputs ({', '.join(GIVEN)})"
            refuse("method", what, f"{self.method!r}, which reads {' and '.join(absent)}")
        options = OPTIONS[self.method]
        others = [name for name in ALL_OPTIONS if name not in options]
        self.refuse_set(others, f"method {self.method!r} has no such option")
        self.refuse_set(OF_OTHER_LOSSES, f"method chooses the loss, here {self.method!r}")
        for name, option in options.items():
            if getattr(self, name) is None:
                setattr(self, name, option.default)
        check_scratch_bytes(self.scratch_bytes)
        for function in _sources(self.method):
            check_options(function, vars(self))
        if "shaping" in inputs_of(self.method):
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
    """`PreferenceConfig` with ``method="tvkd"``: the options of `fastpref.losses.tvkd`.

    ``reference_free=True`` is the paper's; with False and ``alpha=0`` it is DPO.
    """

    method: str = field(default="tvkd", init=False)


@dataclass
class DRDOConfig(PreferenceConfig):
    """`PreferenceConfig` with ``method="drdo"``: the options of `fastpref.losses.drdo`."""

    method: str = field(default="drdo", init=False)


@dataclass
class OracleConfig(PreferenceConfig):
    """`PreferenceConfig` with ``method="oracle"``: the option of `fastpref.losses.oracle`."""

    method: str = field(default="oracle", init=False)
