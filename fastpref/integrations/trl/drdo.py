"""DRDO in TRL: DPOTrainer with an oracle's rewards to match."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig

from fastpref.checks import refuse
from fastpref.data.tokens import IGNORE_INDEX
from fastpref.integrations.trl.base import default_output_dir
from fastpref.integrations.trl.columns import columns_of, missing_columns, stacked
from fastpref.integrations.trl.frozen import load_frozen, require_same_tokens
from fastpref.integrations.trl.metrics import pair_metrics, summed
from fastpref.integrations.trl.options import OF_OTHER_LOSSES, OF_REFERENCE, refuse_options
from fastpref.integrations.trl.rewards import RewardHeadTrainer
from fastpref.linear_losses import drdo_loss
from fastpref.models.reward_head import load_reward_head, reward_head_of, rewards_at_head
from fastpref.ops import Head
from fastpref.sequences import labels_of_states

REWARDS = columns_of("reward")


@dataclass
class DRDOConfig(DPOConfig):
    """DPOConfig, and what `fastpref.drdo_loss` takes beside.

    DRDO has no reference, no ``beta`` and no ``label_smoothing``: these are refused.
    """

    alpha: float = field(default=0.1, metadata={"help": "Weight of the preference term."})
    gamma: float = field(default=2.0, metadata={"help": "Exponent of the focal factor."})
    length_normalize: bool = field(
        default=False,
        metadata={
            "help": "Whether the preference term reads mean log-probabilities a token instead of "
            "sums; with sums it is all but switched off for responses of real length."
        },
    )
    detach_focal: bool = field(
        default=False, metadata={"help": "Whether the focal factor is held constant in backward."}
    )
    scratch_bytes: int = field(
        default=0,
        metadata={
            "help": "Bytes that a trained head may use to keep exponentials for its backward pass "
            "instead of computing them again."
        },
    )


class DRDOTrainer(RewardHeadTrainer):
    r"""Train a student to match an oracle's reward differences while it learns preferences.

    .. math:: L = (\Delta r^* - \Delta \hat r)^2
              - \alpha (1 - p_w)^\gamma \log \frac{\pi_\theta(y_w)}{1 - \pi_\theta(y_l)}

    DRDO (Direct Reward Distillation and policy-Optimization), equation 7. Everything of TRL's
    ``DPOTrainer`` that is not its loss stays. The student gets a linear reward head, saved beside
    it as ``reward_head.safetensors``. The oracle's rewards come from the dataset (columns
    ``chosen_reward`` and ``rejected_reward``) or from ``oracle_model`` in every step.

    Beside TRL's metrics it logs ``rewards/oracle_margin``, ``loss/reward`` and
    ``loss/preference``; ``rewards/*`` are the student's own. Entropy, mean logits and token
    accuracy are of the steps that log.

    Args:
        model: The student, as in ``DPOTrainer``. A folder with a reward head gives that too.
        args: `DRDOConfig`.
        oracle_model: A folder that `OracleTrainer` saved, or a model with a reward head; None where
            the dataset has the columns.
        oracle_processing_class: The oracle's tokenizer; None loads it from where the oracle came
            from.
        **options: All others of ``DPOTrainer``; ``compute_metrics`` is refused, as it wants logits.

    Raises:
        ValueError: Missing columns; an oracle beside a dataset that has them, without a reward
            head, or with another vocabulary; options of DPOConfig that DRDO has no use for.

    Example:
        >>> from fastpref.integrations.trl import DRDOConfig, DRDOTrainer
        >>> def train(student, oracle_folder, pairs):
        ...     args = DRDOConfig("student-drdo", length_normalize=True)
        ...     trainer = DRDOTrainer(
        ...         student, args=args, oracle_model=oracle_folder, train_dataset=pairs
        ...     )
        ...     return trainer.train()
    """

    _tag_names = ["trl", "drdo", "fastpref"]
    _name = "DRDO"
    _paper = {"title": "Direct Reward Distillation and policy-Optimization (DRDO)"}
    oracle_model: Any
    where_columns_come_from = "add them from your oracle, or give the trainer an oracle_model"

    def __init__(
        self,
        model: Any,
        args: DRDOConfig | None = None,
        *,
        oracle_model: Any = None,
        oracle_processing_class: Any = None,
        **options: Any,
    ) -> None:
        args = DRDOConfig(default_output_dir(model, "DRDO")) if args is None else args
        unused = ("beta", "label_smoothing", *OF_OTHER_LOSSES, *OF_REFERENCE)
        refuse_options(args, unused, "DRDO has a loss of its own and no reference")
        self.signal = "reward" if oracle_model is None else None
        self.oracle_model = None
        if oracle_model is not None:
            folder = oracle_model
            oracle_model, oracle_processing_class = load_frozen(
                "oracle_model", oracle_model, oracle_processing_class
            )
            if isinstance(folder, str):
                load_reward_head(oracle_model, folder)
            reward_head_of(oracle_model)
            self.oracle_model = oracle_model
        super().__init__(model, None, args, **options)
        if self.oracle_model is not None:
            require_same_tokens("oracle_model", oracle_processing_class, self._tokenizer)
            self.oracle_model = self.prepare_frozen(self.oracle_model)

    def with_columns(self, dataset: Any, dataset_name: str) -> Any:
        """A dataset with the oracle's rewards, or without where the oracle reads along."""
        if self.oracle_model is not None and not missing_columns(dataset, REWARDS):
            refuse(
                "oracle_model",
                f"None, since the {dataset_name} dataset has its rewards (or a dataset without)",
                "an oracle",
            )
        return super().with_columns(dataset, dataset_name)

    def constants(
        self, inputs: dict[str, Tensor], model_inputs: dict[str, Tensor], labels: Tensor
    ) -> dict[str, Tensor]:
        """The oracle's rewards."""
        if self.oracle_model is None:
            return {"rewards": stacked(inputs, "reward")}
        return {"rewards": self._oracle_rewards(model_inputs, labels)}

    def loss_at_head(
        self, states: Tensor, head: Head, labels: Tensor, constants: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`fastpref.drdo_loss`."""
        output = drdo_loss(
            states,
            head,
            labels=labels_of_states(labels, None, IGNORE_INDEX),
            student_rewards=self.rewards(states, labels),
            oracle_rewards=constants["rewards"],
            alpha=self.args.alpha,
            gamma=self.args.gamma,
            length_normalize=self.args.length_normalize,
            detach_focal=self.args.detach_focal,
            scratch_bytes=self.args.scratch_bytes,
        )
        chosen, rejected = constants["rewards"].chunk(2)
        return output.loss, pair_metrics(output) | {
            "rewards/oracle_margin": summed(chosen - rejected),
            "loss/reward": summed(output.reward_loss),
            "loss/preference": summed(output.preference_loss),
        }

    @torch.no_grad()
    def _oracle_rewards(self, model_inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        oracle = self.accelerator.unwrap_model(self.oracle_model)

        def at_head(states: Tensor, _: Head) -> dict[str, Tensor]:
            return {"rewards": rewards_at_head(oracle, states, labels.to(states.device))}

        inputs = {name: model_inputs[name] for name in ("input_ids", "attention_mask")}
        found: Tensor = self.oracle_model(**inputs, at_head=at_head)["rewards"]
        return found
