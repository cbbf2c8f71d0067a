"""TVKD in TRL: DPOTrainer with a teacher's values as reward shaping."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig

from fastpref.checks import check_choice, refuse
from fastpref.data.tokens import IGNORE_INDEX
from fastpref.integrations.trl.base import (
    FusedPreferenceTrainer,
    default_output_dir,
)
from fastpref.integrations.trl.columns import columns_of, missing_columns, stacked
from fastpref.integrations.trl.frozen import load_frozen, require_same_tokens
from fastpref.integrations.trl.metrics import pair_metrics, summed
from fastpref.integrations.trl.options import OF_OTHER_LOSSES, OF_REFERENCE, refuse_options
from fastpref.linear_losses import tvkd_loss
from fastpref.ops import Head
from fastpref.sequences import labels_of_states
from fastpref.teacher import BadRowsError, add_shaping, teacher_shaping
from fastpref.teacher.shaping import Form, Potential, Terminal

SHAPING = columns_of("shaping")
OF_TEACHER = ("potential", "value_temperature", "gamma", "terminal", "form", "precompute_shaping")


@dataclass
class TVKDConfig(DPOConfig):
    """DPOConfig, and what `fastpref.tvkd_loss` and `fastpref.teacher_shaping` take beside.

    ``beta`` and ``label_smoothing`` keep their names and mean what `tvkd_loss` says. Options of
    DPOConfig that choose another loss are refused.
    """

    alpha: float = field(
        default=1.0, metadata={"help": "Weight of the teacher's shaping; 0 is DPO."}
    )
    reference_free: bool = field(
        default=True,
        metadata={
            "help": "Whether the loss does without a reference model, as in the paper. If False, a "
            "reference is used as in DPOTrainer: `ref_model`, or the checkpoint that the student "
            "was loaded from, or the student with its PEFT adapter off."
        },
    )
    length_normalize: bool = field(
        default=False,
        metadata={"help": "Whether to divide a response's margin by its number of tokens."},
    )
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the mean negative log-probability of the chosen tokens."},
    )
    scratch_bytes: int = field(
        default=0,
        metadata={
            "help": "Bytes that a trained head may use to keep exponentials for its backward pass "
            "instead of computing them again."
        },
    )
    potential: str = field(
        default="value",
        metadata={"help": "The teacher's potential.", "choices": list(get_args(Potential))},
    )
    value_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the teacher's values, in logits."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of the teacher's values."})
    terminal: str = field(
        default="bootstrap",
        metadata={
            "help": "The value after the last token: the teacher's own, or zero.",
            "choices": list(get_args(Terminal)),
        },
    )
    form: str = field(
        default="difference",
        metadata={"help": "The sum over a response.", "choices": list(get_args(Form))},
    )
    precompute_shaping: bool = field(
        default=False,
        metadata={
            "help": "Whether to compute the teacher's shaping of the whole dataset before training "
            "and let go of the teacher. It then reads its own tokens: any tokenizer will do. The "
            "result stays in `output_dir` and is used again."
        },
    )

    def shaping_options(self) -> dict[str, Any]:
        """What `fastpref.teacher_shaping` takes."""
        return {
            "potential": self.potential,
            "temperature": self.value_temperature,
            "gamma": self.gamma,
            "terminal": self.terminal,
            "form": self.form,
        }


class TVKDTrainer(FusedPreferenceTrainer):
    r"""Train a student on preferences, shaped by the values of a preference-tuned teacher.

    .. math:: L = -\log \sigma(m_w - m_l), \qquad
              m = \beta \sum_t \log \pi_\theta(a_t | s_t) - \alpha \sum_t \psi(s_t, a_t)

    TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025). Everything of TRL's
    ``DPOTrainer`` that is not its loss stays: dataset formats, collator, logging, evaluation,
    checkpoints, PEFT. The shaping comes from the dataset (columns ``chosen_shaping`` and
    ``rejected_shaping``, from ``fastpref values``), or from ``teacher_model``: in every step, where
    teacher and student share a tokenizer, or once up front (``precompute_shaping``).

    Beside TRL's metrics it logs ``shaping/chosen``, ``shaping/rejected`` and, with ``sft_weight``,
    ``loss/nll``. Entropy, mean logits and token accuracy cost a pass over the vocabulary of their
    own, so they are of the steps that log, where TRL averages over all since the last.

    Args:
        model: The student, as in ``DPOTrainer``: a name, a folder, a model, a PEFT model.
        ref_model: As in ``DPOTrainer``; only with ``reference_free=False``.
        args: `TVKDConfig`.
        teacher_model: A causal language model, a folder or a name on the Hub; None where the
            dataset has the columns, or with ``alpha=0``.
        teacher_processing_class: The teacher's tokenizer; None loads it from where the teacher
            came from.
        **options: All others of ``DPOTrainer``; ``compute_metrics`` is refused, as it wants logits.

    Raises:
        ValueError: Missing columns; a teacher beside a dataset that has them; a teacher with
            another vocabulary in every step; options of DPOConfig that TVKD has no use for; images;
            adapters with virtual tokens or on the head.

    Example:
        >>> from fastpref.integrations.trl import TVKDConfig, TVKDTrainer
        >>> def train(student, pairs):
        ...     args = TVKDConfig("student-tvkd", beta=0.01, alpha=0.7)
        ...     trainer = TVKDTrainer(student, args=args, train_dataset=pairs)
        ...     return trainer.train()
    """

    _tag_names = ["trl", "tvkd", "fastpref"]
    _name = "TVKD"
    _paper = {"title": "Teacher Value-based Knowledge Distillation (TVKD), NeurIPS 2025"}
    teacher_model: Any
    where_columns_come_from = (
        "add them with `fastpref values`, or give the trainer a teacher_model (or alpha=0)"
    )

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TVKDConfig | None = None,
        *,
        teacher_model: Any = None,
        teacher_processing_class: Any = None,
        **options: Any,
    ) -> None:
        args = TVKDConfig(default_output_dir(model, "TVKD")) if args is None else args
        _check_config(args, teacher_model)
        self.args = args  # DPOTrainer prepares the datasets before it sets them
        self.reference_free = args.reference_free
        reads_along = teacher_model is not None and not args.precompute_shaping
        self.signal = None if reads_along or not args.alpha else "shaping"
        self.teacher_model = None
        if teacher_model is not None and teacher_model is model:
            refuse("teacher_model", "another model than the student", "the student itself")
        if teacher_model is not None:
            self.teacher_model, teacher_processing_class = load_frozen(
                "teacher_model", teacher_model, teacher_processing_class
            )
        self._teacher_tokenizer = teacher_processing_class
        super().__init__(model, ref_model, args, **options)
        if reads_along:
            require_same_tokens("teacher_model", self._teacher_tokenizer, self._tokenizer)
            self.teacher_model = self.prepare_frozen(self.teacher_model)
        else:
            self.teacher_model = None  # it has been read, and its memory is wanted

    def with_columns(self, dataset: Any, dataset_name: str) -> Any:
        """A dataset with its shaping, or without where the teacher reads along."""
        if self.teacher_model is None:
            return super().with_columns(dataset, dataset_name)
        if not missing_columns(dataset, SHAPING):
            refuse(
                "teacher_model",
                f"None, since the {dataset_name} dataset has its shaping (or a dataset without)",
                "a teacher",
            )
        if not self.args.precompute_shaping:
            return dataset
        if not isinstance(dataset, Dataset):
            refuse(f"{dataset_name}_dataset", "a Dataset to precompute", type(dataset).__name__)
        try:
            found = add_shaping(
                dataset,
                self.teacher_model,
                self._teacher_tokenizer,
                Path(self.args.output_dir) / f"{dataset_name}-shaping.parquet",
                max_length=self.args.max_length,
                batch_size=self.args.per_device_train_batch_size,
                **self.args.shaping_options(),
            )
        except BadRowsError as error:
            raise ValueError(
                f"{dataset_name}_dataset: expected rows that the teacher can read; take the others "
                "out, or add the columns with `fastpref values --skip-bad-rows`. " + str(error)
            ) from error
        # Its columns only: a file of an earlier run knows the rows as they were then.
        for column in SHAPING:
            values = found[column][:]
            dataset = dataset.add_column(column, values, feature=found.features[column])
        return dataset

    def constants(
        self, inputs: dict[str, Tensor], model_inputs: dict[str, Tensor], labels: Tensor
    ) -> dict[str, Tensor]:
        """Shaping, and the reference's log-probabilities where there is a reference."""
        constants = {}
        if self.teacher_model is not None:
            constants["shaping"] = self._teacher_shaping(model_inputs, labels)
        elif self.signal is not None:
            constants["shaping"] = stacked(inputs, self.signal)
        if not self.reference_free:
            constants["ref_logps"] = self.reference_logps(inputs)
        return constants

    def loss_at_head(
        self, states: Tensor, head: Head, labels: Tensor, constants: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`fastpref.tvkd_loss`."""
        shaping = constants.get("shaping")
        output = tvkd_loss(
            states,
            head,
            labels=labels_of_states(labels, None, IGNORE_INDEX),
            shaping=states.new_zeros(len(labels)) if shaping is None else shaping,
            beta=self.args.beta,
            alpha=self.args.alpha,
            ref_logps=constants.get("ref_logps"),
            length_normalize=self.args.length_normalize,
            label_smoothing=self.args.label_smoothing,
            sft_weight=self.args.sft_weight,
            scratch_bytes=self.args.scratch_bytes,
        )
        metrics = pair_metrics(output)
        if shaping is not None:
            chosen, rejected = shaping.chunk(2)
            metrics |= {"shaping/chosen": summed(chosen), "shaping/rejected": summed(rejected)}
        if self.args.sft_weight:
            metrics["loss/nll"] = summed(output.nll_loss)
        return output.loss, metrics

    @torch.no_grad()
    def _teacher_shaping(self, model_inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        def at_head(states: Tensor, head: Head) -> dict[str, Tensor]:
            shaping = teacher_shaping(
                states,
                head,
                labels.to(states.device),
                **self.args.shaping_options(),
            )
            return {"shaping": shaping}

        names = ("input_ids", "attention_mask")
        inputs = {name: model_inputs[name] for name in names}
        found: Tensor = self.teacher_model(**inputs, at_head=at_head)["shaping"]
        return found


def _check_config(args: TVKDConfig, teacher_model: Any) -> None:
    refuse_options(args, OF_OTHER_LOSSES, "TVKD has a loss of its own")
    if args.reference_free:
        refuse_options(args, OF_REFERENCE, "there is no reference (reference_free=True)")
    if args.precompute_shaping:
        refuse_options(args, ["truncation_mode"], "a teacher's own tokens are cut at their end")
    if teacher_model is None:
        refuse_options(args, OF_TEACHER, "there is no teacher_model that it is for")
    elif not args.alpha:
        refuse("teacher_model", "None with alpha=0, which does not read it", "a teacher")
    check_choice("potential", args.potential, get_args(Potential))
    check_choice("terminal", args.terminal, get_args(Terminal))
    check_choice("form", args.form, get_args(Form))
