"""What TVKD, DRDO and its oracle share: DPOTrainer with another loss, computed at the head."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import get_config_model_id, use_adapter

from fastpref.checks import refuse
from fastpref.data.tokens import IGNORE_INDEX
from fastpref.integrations.trl.columns import CollatorWithColumns, columns_of, missing_columns
from fastpref.integrations.trl.metrics import vocabulary_metrics
from fastpref.integrations.trl.options import refuse_adapters
from fastpref.models.fused_head import add_fused_head
from fastpref.ops import Head, linear_logps
from fastpref.sequences import labels_of_states, sequence_sum


class FusedPreferenceTrainer(DPOTrainer):
    """DPOTrainer whose step runs a loss of ours at the head, so that no logits exist.

    Subclasses say what the loss is (`loss_at_head`), which signal of the dataset it reads
    (`signal`) and what else it needs of a batch (`constants`, computed without gradients).
    """

    # What transformers leaves open: a configuration of ours, and some model.
    args: Any
    model: Any
    _signature_columns: Any
    signal: str | None = None  # columns "chosen_<signal>" and "rejected_<signal>"
    where_columns_come_from = ""  # advice to who lacks them
    reference_free = True

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *,
        compute_metrics: Any = None,
        peft_config: Any = None,
        **options: Any,
    ) -> None:
        if compute_metrics is not None:
            refuse(
                "compute_metrics", "None, since it wants logits, which never exist", "a function"
            )
        if ref_model is not None and self.reference_free:
            refuse("ref_model", "None, or reference_free=False", type(ref_model).__name__)
        refuse_adapters(model, peft_config)
        self.columns = () if self.signal is None else columns_of(self.signal)
        precomputes = args.precompute_ref_log_probs
        # DPOTrainer loads a reference unless its numbers are precomputed. (It then also hashes the
        # student, a second a gigabyte; and under FSDP loads the reference for a moment.)
        args.precompute_ref_log_probs = precomputes or self.reference_free
        try:
            super().__init__(model, ref_model, args, peft_config=peft_config, **options)
        finally:
            args.precompute_ref_log_probs = precomputes
        self.precompute_ref_logps = precomputes
        if self._is_vision_dataset:
            refuse("train_dataset", "text", "images")
        add_fused_head(self.model)
        self.data_collator = CollatorWithColumns(self.data_collator, self.columns)

    def loss_at_head(
        self, states: Tensor, head: Head, labels: Tensor, constants: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and metrics as sum and count, from (2B, T + 1, H) states.

        ``labels`` (2B, T) are shifted, -100 outside the responses.
        """
        raise NotImplementedError

    def constants(
        self, inputs: dict[str, Tensor], model_inputs: dict[str, Tensor], labels: Tensor
    ) -> dict[str, Tensor]:
        """What the loss needs beside the student; nobody asks for its gradient."""
        return {}

    def prepare_frozen(self, model: Any) -> Any:
        """Place a teacher or oracle that reads along as TRL places a reference."""
        model.eval().requires_grad_(False)
        add_fused_head(model)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(B,) summed log-probabilities of chosen and rejected responses under the reference.

        Without a reference model of its own, that is the student with its adapter off, or with a
        copy of the adapter that it began with.
        """
        student = self.accelerator.unwrap_model(self.model)
        add_fused_head(self.accelerator.unwrap_model(model))
        adapter: AbstractContextManager[None] = nullcontext()
        if self.ref_model is None and is_peft_model(student):
            name = "ref" if "ref" in student.peft_config else None
            adapter = use_adapter(student, adapter_name=name)
        labels = shifted_labels(inputs)

        def at_head(states: Tensor, head: Head) -> dict[str, Tensor]:
            targets = labels_of_states(labels.to(states.device), None, IGNORE_INDEX)
            return {"logps": linear_logps(states, head, targets)}

        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            self.accelerator.autocast(),
        ):
            logps = model(**self._model_inputs(inputs), at_head=at_head)["logps"]
        chosen, rejected = sequence_sum(logps, None).chunk(2)
        return chosen, rejected

    def reference_logps(self, inputs: dict[str, Any]) -> Tensor:
        """(2B,) from the dataset where they were precomputed, else from the reference."""
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        model = self.model if self.ref_model is None else self.ref_model
        return torch.cat(self.compute_ref_log_probs(model, inputs))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        mode = "train" if self.model.training else "eval"
        model_inputs = self._model_inputs(inputs)
        labels = shifted_labels(inputs)
        constants = self.constants(inputs, model_inputs, labels)
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        at_head = partial(self._at_head, labels=labels, constants=constants)
        results = model(**model_inputs, at_head=at_head)
        loss: Tensor = results.pop("loss")
        if "aux_loss" in results:
            aux_loss = results.pop("aux_loss")
            loss = loss + self.router_aux_loss_coef * aux_loss
            results["aux_loss"] = torch.stack(
                [aux_loss.detach().float(), torch.ones_like(aux_loss)]
            )
        self._record(mode, results, inputs["attention_mask"].sum())
        return loss

    def _at_head(
        self, states: Tensor, head: Head, *, labels: Tensor, constants: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        labels = labels.to(states.device)
        constants = {name: values.to(states.device) for name, values in constants.items()}
        loss, metrics = self.loss_at_head(states, head, labels, constants)
        if self._measures_vocabulary():
            metrics |= vocabulary_metrics(states.detach(), head, labels)
        return {"loss": loss, **metrics}

    def _measures_vocabulary(self) -> bool:
        """Whether this step measures what costs a matrix product: evaluation, or one that logs."""
        if self._tp_size > 1:  # `linear_stats` knows no vocabulary that is sharded
            return False
        if not self.model.training:
            return True
        if self.args.logging_strategy != "steps":
            return bool(self.args.logging_strategy != "no")
        step = self.state.global_step + 1
        first = step == 1 and self.args.logging_first_step
        return bool(first or step % self.state.logging_steps == 0)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss; TRL would add the logits."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        return loss, None, None

    def _record(self, mode: str, metrics: dict[str, Tensor], tokens: Tensor) -> None:
        """Add up sums and counts over all processes, in one collective and one read by the host."""
        totals = torch.stack([*metrics.values(), torch.stack([tokens, tokens]).float()])
        *totals, (tokens, _) = self.accelerator.reduce(totals, "sum").tolist()
        for name, (total, count) in zip(metrics, totals, strict=True):
            self._metrics[mode][name].append(total / count if count else 0.0)
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ours = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", *self.columns}
        return {name: value for name, value in inputs.items() if name not in ours}

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        dataset = self.with_columns(dataset, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def with_columns(self, dataset: Any, dataset_name: str) -> Any:
        """A dataset with the numbers that the loss reads; one without is refused."""
        missing = missing_columns(dataset, self.columns)
        if missing:
            refuse(
                f"{dataset_name}_dataset",
                f"columns {' and '.join(self.columns)}; {self.where_columns_come_from}",
                f"no {' and no '.join(missing)}",
            )
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return (
            dataset
            if self.reference_free
            else super()._precompute_ref_logps(dataset, name, batch_size)
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]  # TRL's own
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *self.columns])]


def shifted_labels(inputs: dict[str, Tensor]) -> Tensor:
    """(2B, T) the tokens that all states but the last predict, -100 outside the responses."""
    tokens, mask = inputs["input_ids"], inputs["completion_mask"]
    return tokens.masked_fill(mask == 0, IGNORE_INDEX)[:, 1:]


def default_output_dir(model: Any, method: str) -> str:
    """Where TRL's trainers would write without configuration."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return f"{name.split('/')[-1]}-{method}"
