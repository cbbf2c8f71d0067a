"""What a trainer asks the reference, teachers and oracles about a batch, once each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils as trl_utils

from fastpref.integrations.trl import metrics
from fastpref.integrations.trl.batches import mismatched, shifted_labels
from fastpref.integrations.trl.cached import TeacherColumns
from fastpref.integrations.trl.passes import BOTH, CachedReading, Comparison, Reading, Sides
from fastpref.integrations.trl.readers import Reader, kept_reading
from fastpref.integrations.trl.saving import SavesRewardHead
from fastpref.integrations.trl.signals import REFERENCE, Signal, responses_logps
from fastpref.models.fused_head import add_fused_head
from fastpref.ops import Head


class ReadsModels(SavesRewardHead):
    """DPOTrainer that has a batch read by the models that its losses want beside the student."""

    args: Any  # what transformers leaves open
    # DPOTrainer's own __init__ reads batches where it precomputes a reference.
    signals: Mapping[str, Signal] = {}
    columns: tuple[str, ...] = ()
    cache: TeacherColumns | None = None
    readers: list[Reader]
    comparisons: dict[Comparison, Sides]

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(B,) summed log-probabilities of chosen and rejected responses under the reference.

        Without a reference model of its own, that is the student with its adapter off, or with a
        copy of the adapter that it began with.
        """
        chosen, rejected = self._read_by_reference(model, inputs)[0].chunk(2)
        return chosen, rejected

    def _reference(self) -> Any:
        """The reference model, or the student, whose adapter is off as it reads."""
        return self.model if self.ref_model is None else self.ref_model

    def _read_by_reference(
        self, model: Any, inputs: dict[str, Any], *, keep_states: bool = False
    ) -> tuple[Tensor, Reading | None]:
        """The reference's (S,) log-probabilities of responses, and its states if they are kept."""
        student = self.accelerator.unwrap_model(self.model)
        take_over_head(self.accelerator.unwrap_model(model))
        adapter: AbstractContextManager[None] = nullcontext()
        if self.ref_model is None and is_peft_model(student):
            name = "ref" if "ref" in student.peft_config else None
            adapter = trl_utils.use_adapter(student, adapter_name=name)
        kept: list[Reading] = []
        spread = self.is_deepspeed_enabled or self.is_fsdp_enabled

        def keep(states: Tensor, head: Head) -> None:
            if keep_states:
                kept.append(kept_reading(states, head, BOTH, spread))

        with adapter:
            logps = self._logps_without_gradient(model, inputs, keep)
        return logps, kept[0] if kept else None

    def _logps_without_gradient(
        self, model: Any, inputs: dict[str, Any], keep: Callable[[Tensor, Head], None] | None = None
    ) -> Tensor:
        """(S,) summed log-probabilities of responses under a model."""
        labels = shifted_labels(inputs)

        def at_head(states: Tensor, head: Head) -> dict[str, Tensor]:
            if keep is not None:
                keep(states, head)
            return {"logps": responses_logps(states, head, labels)}

        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
        ):
            logps: Tensor = model(**self._model_inputs(inputs), at_head=at_head)["logps"]
        return logps

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        prepare = partial(
            super()._prepare_dataset,
            processing_class=processing_class,
            args=args,
            dataset_name=dataset_name,
        )
        if self.cache is None:
            return prepare(dataset)
        return self.cache.beside_tokens(dataset, dataset_name, prepare)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.args.has_reference():
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _read(
        self, model: Any, inputs: dict[str, Any], labels: Tensor, pairs: int
    ) -> tuple[dict[str, Tensor], dict[str, Reading | CachedReading]]:
        """What losses read beside the student's own numbers: of columns, and of other models."""
        columns = {name: one for name, one in self.signals.items() if one.read is None}
        signals = {name: one.of_batch(inputs) for name, one in columns.items()}
        readings: dict[str, Reading | CachedReading] = {}
        if self.cache is not None:
            readings["teacher_model"] = self.cache.reading(inputs)
        for reader in self.readers:
            found, reading = reader(inputs, labels, pairs)
            signals |= found
            if reading is not None:
                readings[reader.argument] = reading
        for name, signal in self.signals.items():
            if signal.join is not None:
                signals[name] = signal.join(signals, labels)
        if self.precompute_ref_logps:
            signals["ref_logps"] = REFERENCE.of_batch(inputs)
        elif self.args.has_reference():
            compared = any("ref_model" in one.models for one in self.comparisons)
            logps, reading = self._read_by_reference(
                self._reference(), inputs, keep_states=compared
            )
            signals["ref_logps"] = logps
            if reading is not None:
                readings["ref_model"] = reading
        if self.args.reads("desirable"):
            signals["desirable"] = torch.arange(len(labels), device=labels.device) < pairs
        if self.args.reads("kl_log_ratios"):
            signals["kl_log_ratios"] = self._mismatched_log_ratio(model, inputs, pairs)
        return signals, readings

    def _mismatched_log_ratio(self, model: Any, inputs: dict[str, Any], pairs: int) -> Tensor:
        """() the mean log-ratio of mismatched prompts and responses, over all processes."""
        total = torch.zeros(2, device=inputs["input_ids"].device)
        if pairs > 1:  # the two responses of one pair have the same prompt
            others = mismatched(inputs, self.args.max_length)
            ratios = self._logps_without_gradient(model, others)
            ratios = ratios - self._read_by_reference(self._reference(), others)[0]
            total = metrics.summed(ratios)
        ratio, count = self.accelerator.reduce(total, "sum")
        mean: Tensor = ratio / count.clamp_min(1)
        return mean

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        cached = () if self.cache is None else self.cache.endings
        ours = {"completion_mask", *REFERENCE.columns, *self.columns, *cached}
        return {name: value for name, value in inputs.items() if name not in ours}


def take_over_head(model: Any) -> None:
    """`add_fused_head`, in place of TRL's own fused head where that is outermost."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = bare.__dict__.get("forward")
    if inspect.ismethod(forward) and forward.__func__.__globals__ is vars(trl_utils):
        # TRL has no switch for it: what it covered is a variable of its function. TRL 1.14 has no
        # fused head.
        below = inspect.getclosurevars(forward.__func__).nonlocals["original_forward"]
        del bare.forward
        if below != bare.forward:  # somebody else's, accelerate's hooks for example
            bare.forward = below
    add_fused_head(bare)
