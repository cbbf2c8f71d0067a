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
    check_annotated,
    check_choice,
    check_number,
    check_scratch_bytes,
    options_of,
    refuse,
)
from fastpref.integrations.trl.options import (
    advantage_options,
    cache_options,
    divergence_options,
    reference_options,
    sampling_options,
    shaping_options,
    token_options,
)
from fastpref.losses import METHODS
from fastpref.responses import Responses

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
GIVEN = (
    "responses chosen ref_logps shaping oracle_rewards rewards student_rewards log_weights "
    "divergences advantages teacher_logps kl_log_ratios desirable"
).split()
# Methods with a teacher that is not compared by the forward KL.
OPEN_DIVERGENCE = ("gkd",)
BY_TOKENS = ("dpkd_token",)


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
    if "advantages" in inputs:
        sources.append(advantage_options)
    if method in BY_TOKENS:
        sources.append(token_options)
    elif reads_teacher(method):
        sources.append(cache_options)
    if method in OPEN_DIVERGENCE:
        sources += [divergence_options, sampling_options]
    return sources


def reads_teacher(method: str) -> bool:
    """Whether a loss is compared with a teacher at every token."""
    inputs = inputs_of(method)
    return "divergences" in inputs and "ref_logps" not in inputs


def _help(name: str, function: Callable[..., Any]) -> str:
    """What the docstring of a function says of an argument, and its default."""
    doc = inspect.getdoc(function) or ""
    found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", doc.partition("Args:\n")[2], re.M)
    text = "" if found is None else re.sub(r"\s+", " ", found[1]).replace("``", "")
    return f"{text} If not set: {_options(function)[name].default}."


def texts_of(name: str) -> dict[str, list[str]]:
    """What an option is, and the methods in which it is that."""
    texts: dict[str, list[str]] = {}
    for method in METHODS:
        for function in _sources(method):
            if name in _options(function):
                texts.setdefault(_help(name, function), []).append(method)
    return texts


def _field(name: str) -> tuple[str, Any, Any]:
    """An option of one method or of several, as a field that is None where it is not set."""
    annotations = [options[name].annotation for options in OPTIONS.values() if name in options]
    texts = (f"[{', '.join(methods)}] {text}" for text, methods in texts_of(name).items())
    metadata: dict[str, Any] = {"help": " ".join(texts).replace("%", "%%")}
    literals = [one for one in annotations if get_origin(one) is Literal]
    choices = dict.fromkeys(choice for one in literals for choice in get_args(one))
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

    An option is what the function ``fastpref.losses.<method>`` says of it, and has that function's
    default where it is not set. What a loss reads has options, too: ``precompute_shaping`` and
    those of `fastpref.teacher_shaping`, whose ``temperature`` is ``value_temperature`` and whose
    ``beta`` is ``value_beta``;
    ``reference_free`` where a reference is optional; ``divergence``, ``lmbda`` and others of GKD;
    ``advantage_clip``; ``token_beta`` of a preference at every token; ``topk_tail`` for a teacher's
    likeliest tokens in columns. Refused are options that the method does not have, values out of
    range, and another loss of DPOConfig.

    Several methods are trained at once, as the sum of their losses: ``method_weights`` weighs
    them, and an option goes to every one that has it; where it is not set, each has its own
    default, and the field stays None if these differ.

    Example:
        >>> from fastpref.integrations.trl import PreferenceConfig
        >>> args = PreferenceConfig("student-ipo", method="ipo", beta=0.2, use_cpu=True, bf16=False)
        >>> args.beta, args.length_normalize, args.alpha
        (0.2, True, None)
        >>> mixed = PreferenceConfig("student", method=["dpo", "sft"], method_weights=[1.0, 0.1],
        ...                          use_cpu=True, bf16=False)
        >>> mixed.methods
        {'dpo': 1.0, 'sft': 0.1}
    """

    method: list[str] | str = field(
        default="dpo",
        metadata={
            "help": "Which loss of fastpref.losses to train, or several of them.",
            "choices": list(METHODS),
        },
    )
    method_weights: list[float] | None = field(
        default=None,
        metadata={"help": "The weight of each loss where there are several; by default 1."},
    )
    scratch_bytes: int | None = field(
        default=None,
        metadata={
            "help": "The most bytes that a trained head keeps for its backward pass instead of "
            "computing them again; by default what the batch needs, up to 1 GiB."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher, where the trainer is given no teacher_model."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What from_pretrained takes beside the teacher's name; JSON on a command line."
        },
    )
    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

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

    @property
    def methods(self) -> dict[str, float]:
        """The weight of each method."""
        names = [self.method] if isinstance(self.method, str) else self.method
        return dict(zip(names, self.method_weights or [1.0] * len(names), strict=True))

    def options(self, method: str) -> dict[str, Any]:
        """What a method's loss takes beside what it reads of a batch."""
        return self.options_of(METHODS[method])

    def options_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The options that are keywords of a function, its own defaults where they are not set."""
        values = {name: getattr(self, name) for name in _options(function)}
        return {
            name: _options(function)[name].default if value is None else value
            for name, value in values.items()
        }

    def inputs(self, method: str) -> set[str]:
        """What a loss reads of a batch with the options that it has."""
        found = set(inputs_of(method))
        if self.options(method).get("alpha") == 0:
            found.discard("shaping")
        if inputs_of(method).get("ref_logps") is False and self.reference_free:
            found.discard("ref_logps")
        return found

    def reads(self, name: str) -> bool:
        """Whether some loss reads this of a batch."""
        return any(name in self.inputs(method) for method in self.methods)

    def shaping_options(self) -> dict[str, Any]:
        """What `fastpref.teacher_shaping` takes."""
        return shaping_options(**self.options_of(shaping_options))

    def reads_implicit_reward(self) -> bool:
        """Whether some loss reads a shaping that takes the teacher's own reference."""
        potential: str = self.shaping_options()["potential"]
        return self.reads("shaping") and potential == "implicit_reward"

    def divergence_options(self, method: str) -> dict[str, Any]:
        """What `fastpref.linear_divergence` takes for a method's ``divergences``.

        Or `fastpref.linear_token_preference`, where the kind is none of divergences.
        """
        if method in BY_TOKENS:
            return token_options(**self.options_of(token_options))
        if method not in OPEN_DIVERGENCE:
            return {"kind": "forward_kl"}
        return divergence_options(**self.options_of(divergence_options))

    def topk_tail_of_columns(self) -> str:
        """The ``tail`` of `fastpref.linear_topk_divergence`."""
        return cache_options(**self.options_of(cache_options))

    def advantage_clipping(self) -> tuple[float, float] | None:
        """The ``clip`` of `fastpref.linear_divergence` for advantages."""
        return advantage_options(advantage_clip=self.advantage_clip)

    def sampling_options(self) -> dict[str, Any]:
        """What ``generate`` takes for responses that the student writes."""
        return sampling_options(**self.options_of(sampling_options))

    def has_reference(self) -> bool:
        """Whether a loss reads the log-probabilities of a reference."""
        return self.reads("ref_logps")

    def refuse_set(self, names: Iterable[str], reason: str) -> None:
        """Refuse options that were set to something else than their default."""
        for name in names:
            defaults = [_defaults(self)[name]]
            for method in self.methods:
                if name in OPTIONS[method]:
                    defaults.append(OPTIONS[method][name].default)
            if getattr(self, name) not in defaults:
                refuse(name, f"{defaults[-1]!r}, since {reason}", repr(getattr(self, name)))

    def _settle(self) -> None:
        """Give the methods' options their values, and refuse what they have no use for."""
        self._settle_methods()
        owned = {option for method in self.methods for option in OPTIONS[method]}
        others = [name for name in ALL_OPTIONS if name not in owned]
        self.refuse_set(others, f"method {self.method!r} has no such option")
        self.refuse_set(OF_OTHER_LOSSES, f"method chooses the loss, here {self.method!r}")
        for name in owned:
            defaults = [OPTIONS[one][name].default for one in self.methods if name in OPTIONS[one]]
            if getattr(self, name) is None and all(one == defaults[0] for one in defaults):
                setattr(self, name, defaults[0])
        check_scratch_bytes(self.scratch_bytes)
        for method in self.methods:
            for function in _sources(method):
                options = self.options_of(function)
                check_annotated(options_of(function), options)
                if function is not METHODS[method]:
                    function(**options)
        if not self.precompute_shaping:
            self.refuse_set(["skip_bad_rows"], "rows are left out of a precompute alone")
        elif self.reads("shaping"):
            self.refuse_set(["truncation_mode"], "a teacher's own tokens are cut at their end")
        self._settle_reference()
        if self.reads("kl_log_ratios") and self.per_device_train_batch_size < 2:
            expected = "at least 2, since KTO pairs a prompt with the response of another"
            refuse("per_device_train_batch_size", expected, self.per_device_train_batch_size)
        if self.lmbda and len(self.methods) > 1:
            expected = "0 beside other losses, which read the dataset's responses"
            refuse("lmbda", expected, self.lmbda)

    def _settle_methods(self) -> None:
        """Refuse methods that there are not, and weights that are not theirs."""
        if self.method and not isinstance(self.method, str) and len(self.method) == 1:
            (self.method,) = self.method  # as a command line has it
        names = [self.method] if isinstance(self.method, str) else self.method
        if not names or len(set(names)) < len(names):
            refuse("method", "a method, or several, each of them once", repr(self.method))
        for name in names:
            check_choice("method", name, tuple(OPTIONS))
            if absent := [one for one in inputs_of(name) if one not in GIVEN]:
                what = f"a method of which a trainer has all inputs ({', '.join(GIVEN)})"
                refuse("method", what, f"{name!r}, which reads {' and '.join(absent)}")
        weights = self.method_weights
        if weights is None:
            return
        if not isinstance(weights, list | tuple) or len(weights) != len(names):
            refuse("method_weights", f"{len(names)} numbers, as many as methods", repr(weights))
        for weight in weights:
            check_number("method_weights", weight, at_least=0)

    def _settle_reference(self) -> None:
        """Refuse options of a reference that is not there, or that is more than its numbers."""
        if not self.has_reference():
            self.refuse_set(OF_REFERENCE, "there is no reference")
            # DPOTrainer loads a reference unless its numbers are said to be there.
            self.precompute_ref_log_probs = True
            return
        in_every_step = [
            method
            for method in self.methods
            if {"ref_logps", "divergences"} <= self.inputs(method)
            or "kl_log_ratios" in self.inputs(method)
        ]
        if in_every_step:
            reason = f"{in_every_step[0]!r} reads more of the reference than can be stored"
            self.refuse_set(["precompute_ref_log_probs"], reason)


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
