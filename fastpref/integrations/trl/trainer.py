"""DPOTrainer with a loss of `fastpref.losses`, computed at the head."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from fastpref.checks import refuse
from fastpref.data.tokens import IGNORE_INDEX
from fastpref.integrations.trl import metrics
from fastpref.integrations.trl.batches import chosen_half, shifted_labels, written_by
from fastpref.integrations.trl.cached import CollatorWithTeacher, columns_of_teacher
from fastpref.integrations.trl.config import (
    DRDOConfig,
    OracleConfig,
    PreferenceConfig,
    TVKDConfig,
    inputs_of,
)
from fastpref.integrations.trl.papers import cited
from fastpref.integrations.trl.passes import (
    CachedReading,
    Comparison,
    Reading,
    Sides,
    comparison_of,
    comparisons_of,
    log_weights,
    sides_of,
    student_numbers,
)
from fastpref.integrations.trl.reading import ReadsModels, take_over_head
from fastpref.integrations.trl.signals import (
    CollatorWithColumns,
    Signal,
    missing_columns,
    named_teacher,
    signals_of,
    warn_of_other_lengths,
)
from fastpref.losses import METHODS
from fastpref.models.reward_head import rewards_at_head
from fastpref.ops import Head
from fastpref.responses import Tokens
from fastpref.sequences import labels_of_states

OF_REWARD_HEAD = ("rewards", "student_rewards")  # inputs of a loss that the model itself gives


class PreferenceTrainer(ReadsModels):
    """TRL's ``DPOTrainer`` with any loss of `fastpref.losses`, and without logits.

    Everything of ``DPOTrainer`` that is not its loss stays: dataset formats, collator, logging,
    evaluation, checkpoints, PEFT. What a loss reads beside the model comes from

    - the dataset: columns ``chosen_shaping`` and ``rejected_shaping`` (from ``fastpref values``),
      ``chosen_reward`` and ``rejected_reward`` (from your oracle), ``teacher_chosen_logps`` and
      ``teacher_rejected_logps`` (from your teacher), or those of ``fastpref kd-cache``;
    - a teacher or an oracle, in every step, or a teacher once up front (``precompute_shaping``);
    - a reference, as in ``DPOTrainer``, for methods that have one.

    Several methods, ``method=["tvkd", "sft"]``, are trained at once as the weighted sum of their
    losses; every model reads a batch once.

    It logs TRL's metrics, the parts of the loss as ``losses/*``, and ``shaping/*`` and
    ``rewards/oracle_margin`` where the loss reads them. Of several methods each is
    ``losses/<name>``, and what two of them log under one name is that of the first. Methods that
    learn rewards of their own give the model a linear reward head, saved beside it as
    ``reward_head.safetensors``.

    Args:
        model: As in ``DPOTrainer``. A folder with a reward head gives that too.
        ref_model: As in ``DPOTrainer``; only for methods with a reference.
        args: `PreferenceConfig`, or a ``DPOConfig``: its fields are
            carried over, ours keep their defaults.
        teacher_model: For methods that read a teacher: a causal language model, a folder or a name
            on the Hub; None where ``args.teacher_model_name_or_path`` says it, where the dataset
            has the columns, or for TVKD with ``alpha=0``.
        teacher_ref_model: For ADPA, and for TVKD with a teacher and
            ``potential="implicit_reward"``: the teacher as it was before it was aligned.
        teacher_processing_class: Their tokenizer; None loads the one from where they came from.
        oracle_model: For methods that read an oracle's rewards: a folder that `OracleTrainer`
            saved, or a model with a reward head; None where the dataset has the columns.
        oracle_processing_class: As the teacher's.
        train_dataset: As in ``DPOTrainer``, like all that follows.
        eval_dataset: One dataset, or several by name.
        peft_config: LoRA or another without virtual tokens.
        compute_metrics: None, since it wants logits.
        **options: All others of ``DPOTrainer``.

    Raises:
        ValueError: Missing columns or models, or a model beside a dataset that has its columns;
            numbers in them that are not finite; a teacher or oracle with another vocabulary in
            every step; options that no method has a use for; images; adapters with virtual tokens
            or on the head.

    Example:
        >>> from fastpref.integrations.trl import PreferenceConfig, PreferenceTrainer
        >>> def train(model, pairs):
        ...     args = PreferenceConfig("student-ipo", method="ipo", beta=0.2)
        ...     return PreferenceTrainer(model, args=args, train_dataset=pairs).train()
    """

    config_class: type[PreferenceConfig] = PreferenceConfig
    # What transformers leaves open.
    args: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *,
        teacher_model: Any = None,
        teacher_ref_model: Any = None,
        teacher_processing_class: Any = None,
        oracle_model: Any = None,
        oracle_processing_class: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        **options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self.config_class.method}")
        args = self.config_class.of(args)
        if "method" in options:
            refuse("method", "a method in args, PreferenceConfig(method=...)", options["method"])
        if compute_metrics is not None:
            refuse("compute_metrics", "None, since it wants logits, which never exist", "one")
        if ref_model is not None and not args.has_reference():
            reason = "there is no reference (TVKD has one with reference_free=False)"
            refuse("ref_model", f"None, since {reason}", type(ref_model).__name__)
        refuse_adapters(model, peft_config)
        teacher_model = named_teacher(args, teacher_model)
        models = {
            "teacher_ref_model": (teacher_ref_model, teacher_processing_class),
            "teacher_model": (teacher_model, teacher_processing_class),
            "oracle_model": (oracle_model, oracle_processing_class),
        }
        self.cache = columns_of_teacher(args, teacher_model, train_dataset)
        cached = self.cache is not None
        signals, self.readers = signals_of(args, model, models, train_dataset, cached)
        super().__init__(
            model,
            ref_model,
            args,
            train_dataset=prepared(train_dataset, "train", signals),
            eval_dataset=prepared(eval_dataset, "eval", signals),
            peft_config=peft_config,
            **options,
        )
        # Models that computed columns have done so, and their memory is wanted.
        self.signals = {name: replace(signal, compute=None) for name, signal in signals.items()}
        in_columns = [signal.columns for signal in signals.values() if signal.read is None]
        self.columns = tuple(itertools.chain(*in_columns))
        self.data_collator = CollatorWithColumns(self.data_collator, self.columns)
        if self.cache is not None:
            self.data_collator = CollatorWithTeacher(self.data_collator, self.cache)
            self.cache.check_head(self.model)
        for reader in self.readers:
            reader.join(self)
        self.precompute_ref_logps = self.precompute_ref_logps and args.has_reference()
        take_over_head(self.model)
        if any(args.reads(name) for name in OF_REWARD_HEAD):
            self.give_reward_head(model)
        self.comparisons = comparisons_of(args)
        self._name = "+".join(args.methods)
        self._paper = cited(args.methods)
        self._tag_names = ["trl", "fastpref", *args.methods]
        self.model.add_model_tags(self._tag_names)
        for signal in self.signals.values():
            if signal.read is None:
                warn_of_other_lengths(self.train_dataset, signal, args.max_length)

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **options: Any) -> Any:
        """As ``DPOTrainer``; new datasets need what the training dataset needed."""
        eval_dataset = prepared(eval_dataset, "eval", self.signals)
        return super().evaluate(eval_dataset, *arguments, **options)

    def prediction_step(
        self, model: Any, inputs: Any, *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """The loss; TRL would add the logits."""
        loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only=True)
        return loss, None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        mode = "train" if self.model.training else "eval"
        pairs = len(inputs["input_ids"]) // 2
        if not self._reads_rejected():
            inputs = chosen_half(inputs)
        if mode == "train" and self._is_on_policy():
            inputs = self._with_own_responses(model, inputs)
        labels = shifted_labels(inputs)
        signals, readings = self._read(model, inputs, labels, pairs)
        model_inputs = self._model_inputs(inputs)
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        at_head = partial(
            self._at_head, labels=labels, pairs=pairs, signals=signals, readings=readings
        )
        results = model(**model_inputs, at_head=at_head)
        loss: Tensor = results.pop("loss")
        if "aux_loss" in results:
            aux_loss = results.pop("aux_loss")
            loss = loss + self.router_aux_loss_coef * aux_loss
            aux_loss = aux_loss.detach().float()
            results["aux_loss"] = torch.stack([aux_loss, torch.ones_like(aux_loss)])
        self._record(mode, results, inputs["attention_mask"].sum())
        return loss

    def _reads_rejected(self) -> bool:
        """Whether some loss reads more of a pair than its chosen response."""
        return any(self.args.inputs(one) - {"chosen", "divergences"} for one in self.args.methods)

    def _is_on_policy(self) -> bool:
        """Whether the student writes this step's responses.

        That follows from the seed and the number of the step: it is the same in every process,
        which all have to generate together, and after a training was resumed.
        """
        draw = random.Random(f"{self.args.seed} {self.state.global_step}").random()
        return draw < (self.args.lmbda or 0.0)

    def _with_own_responses(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with the student's responses to its prompts."""
        with (
            # Until 1.16 TRL turned checkpointing on again with other options than it had.
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            unwrap_model_for_generation(model, self.accelerator) as student,
        ):
            return written_by(student, inputs, self._tokenizer, self.args.sampling_options())

    def _at_head(
        self,
        states: Tensor,
        head: Head,
        *,
        labels: Tensor,
        pairs: int,
        signals: dict[str, Tensor],
        readings: dict[str, Reading | CachedReading],
    ) -> dict[str, Tensor]:
        """The loss, and metrics as sum and count, from (2B, T + 1, H) states, (2B, T) labels."""
        args = self.args
        labels = labels.to(states.device)
        signals = {name: values.to(states.device) for name, values in signals.items()}
        targets = labels_of_states(labels, None, IGNORE_INDEX)  # (2B, T + 1)
        mask = targets != IGNORE_INDEX
        sides = reduce(Sides.union, map(sides_of, args.methods))
        found = student_numbers(
            states, head, targets, pairs, sides, self.comparisons, readings, args.scratch_bytes
        )
        measured = metrics.of_signals(signals)
        measured["entropy"] = metrics.summed(found.entropy, mask[sides.rows(pairs)])
        measured["mean_token_accuracy"] = metrics.summed(found.is_top1[:pairs], mask[:pairs])
        if self._tp_size == 1:  # else the mean row of the head is on no process
            measured |= metrics.of_logits(states, head, mask, pairs)
        for name in OF_REWARD_HEAD:
            if args.reads(name):
                student = self.accelerator.unwrap_model(self.model)
                signals[name] = rewards_at_head(student, states, labels)
        if args.reads("log_weights"):
            signals["log_weights"] = log_weights(states, head, targets, found.logps)
        losses = []
        for method, weight in args.methods.items():
            rows = sides_of(method).rows(pairs)
            # Not summed yet: a pair kernel does that where there is one.
            tokens = Tokens(found.logps[rows], mask[rows], None, None)
            given = {name: signals[name] for name in args.inputs(method) & signals.keys()}
            given |= self._divergences(method, found.divergences, pairs)
            if inputs_of(method).get("shaping"):  # required, but with alpha=0 there is none
                given.setdefault("shaping", states.new_zeros(len(states)))
            options = args.options(method)
            output = METHODS[method](tokens, **given, **options)
            losses.append(output.loss if weight == 1 else weight * output.loss)
            measured = {**metrics.of_output(output, options), **measured}
            if len(args.methods) > 1:
                measured[f"losses/{method}"] = metrics.summed(output.loss.detach())
        return {"loss": sum(losses[1:], losses[0]), **measured}

    def _divergences(
        self, method: str, divergences: dict[Comparison, Tensor], pairs: int
    ) -> dict[str, Tensor]:
        """A method's divergences, by the name of the loss's parameter, of its own responses."""
        read = comparison_of(self.args, method)
        if read is None:
            return {}
        comparison, sides = read
        rows = sides.within(self.comparisons[comparison]).rows(pairs)
        name = "advantages" if comparison.kind == "advantage" else "divergences"
        return {name: divergences[comparison][rows]}

    def _record(self, mode: str, measured: dict[str, Tensor], tokens: Tensor) -> None:
        """Add up sums and counts over all processes, in one collective and one read by the host."""
        totals = torch.stack([*measured.values(), torch.stack([tokens, tokens]).float()])
        *totals, (tokens, _) = self.accelerator.reduce(totals, "sum").tolist()
        for name, (total, count) in zip(measured, totals, strict=True):
            self._metrics[mode][name].append(total / count if count else 0.0)
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]  # TRL's own
        cached = () if self.cache is None else self.cache.columns
        ours = [*self.columns, *cached]
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *ours])]


class TVKDTrainer(PreferenceTrainer):
    """`PreferenceTrainer` for TVKD: a student shaped by the values of a preference-tuned teacher.

    The loss is `fastpref.losses.tvkd`. The shaping comes from the dataset (from ``fastpref
    values``), or from ``teacher_model``: in every step, where teacher and student share a
    tokenizer, or once up front (``precompute_shaping``).

    Example:
        >>> from fastpref.integrations.trl import TVKDConfig, TVKDTrainer
        >>> def train(student, pairs):
        ...     args = TVKDConfig("student-tvkd", beta=0.01, alpha=0.7)
        ...     return TVKDTrainer(student, args=args, train_dataset=pairs).train()
    """

    config_class = TVKDConfig


class DRDOTrainer(PreferenceTrainer):
    """`PreferenceTrainer` for DRDO: a student matches an oracle's rewards as it learns preferences.

    The loss is `fastpref.losses.drdo`. The student gets a linear reward head, saved beside it, and
    ``rewards/*`` are its own.

    Example:
        >>> from fastpref.integrations.trl import DRDOConfig, DRDOTrainer
        >>> def train(student, oracle_folder, pairs):
        ...     args = DRDOConfig("student-drdo", length_normalize=True)
        ...     models = {"model": student, "oracle_model": oracle_folder}
        ...     return DRDOTrainer(**models, args=args, train_dataset=pairs).train()
    """

    config_class = DRDOConfig


class OracleTrainer(PreferenceTrainer):
    """`PreferenceTrainer` for DRDO's first stage: what it saves is an ``oracle_model``.

    The loss is `fastpref.losses.oracle`. Of the rejected responses only the reward head reads
    something, so that entropy is of the chosen ones.

    Example:
        >>> from fastpref.integrations.trl import OracleConfig, OracleTrainer
        >>> def train(model, pairs):
        ...     trainer = OracleTrainer(model, args=OracleConfig("oracle"), train_dataset=pairs)
        ...     trainer.train()
        ...     trainer.save_model()
    """

    config_class = OracleConfig


def prepared(dataset: Any, name: str, signals: Mapping[str, Signal]) -> Any:
    """A dataset, or several by name, with what the signals read of it."""
    if dataset is None or isinstance(dataset, str):  # the name of one that was prepared
        return dataset
    if isinstance(dataset, dict):
        return {key: prepared(one, key, signals) for key, one in dataset.items()}
    if len(missing_columns(dataset, ("image", "images"))) < 2:
        refuse(f"{name}_dataset", "text", "images")
    for signal in signals.values():
        dataset = signal.prepare(dataset, name)
    return dataset


def refuse_adapters(model: Any, peft_config: Any) -> None:
    """Refuse adapters that put virtual tokens before a prompt, which have no labels."""
    for config in [peft_config, *getattr(model, "peft_config", {}).values()]:
        if getattr(config, "is_prompt_learning", False):
            got = f"{type(config).__name__}, whose virtual tokens shift the response"
            refuse("peft_config", "an adapter of the model's layers, LoRA for example", got)
