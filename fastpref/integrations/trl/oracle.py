"""The first stage of DRDO: an oracle that rewards responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from trl.trainer.dpo_config import DPOConfig

from fastpref import losses
from fastpref.data.tokens import IGNORE_INDEX
from fastpref.integrations.trl.base import default_output_dir
from fastpref.integrations.trl.metrics import summed
from fastpref.integrations.trl.options import OF_OTHER_LOSSES, OF_REFERENCE, refuse_options
from fastpref.integrations.trl.rewards import RewardHeadTrainer
from fastpref.ops import Head, linear_logps
from fastpref.responses import sum_responses
from fastpref.sequences import labels_of_states


@dataclass
class OracleConfig(DPOConfig):
    """DPOConfig, and the weight of the likelihood. ``beta`` and ``label_smoothing`` are refused."""

    sft_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the winner's mean negative log-probability a token."},
    )


class OracleTrainer(RewardHeadTrainer):
    r"""Train a language model with a linear reward head to tell chosen from rejected.

    .. math:: L = -\log \sigma(r_w - r_l) - \lambda \log \pi(y_w)

    DRDO (Direct Reward Distillation and policy-Optimization), equation 6, with the log-probability
    a token. What it saves is an ``oracle_model`` for `DRDOTrainer`: a model of transformers, and
    beside it ``reward_head.safetensors``. It logs ``rewards/*`` and ``logps/chosen`` as TRL does,
    ``loss/preference`` and ``loss/nll``.

    Args:
        model: As in ``DPOTrainer``. A folder with a reward head gives that too.
        args: `OracleConfig`.
        **options: All others of ``DPOTrainer``; ``compute_metrics`` is refused, as it wants logits.

    Raises:
        ValueError: Options of DPOConfig that the oracle has no use for; images; adapters with
            virtual tokens or on the head.

    Example:
        >>> from fastpref.integrations.trl import OracleConfig, OracleTrainer
        >>> def train(model, pairs):
        ...     trainer = OracleTrainer(model, args=OracleConfig("oracle"), train_dataset=pairs)
        ...     trainer.train()
        ...     trainer.save_model()
    """

    _tag_names = ["trl", "drdo", "fastpref"]
    _name = "DRDO oracle"
    _paper = {"title": "Direct Reward Distillation and policy-Optimization (DRDO)"}

    def __init__(self, model: Any, args: OracleConfig | None = None, **options: Any) -> None:
        args = OracleConfig(default_output_dir(model, "oracle")) if args is None else args
        unused = ("beta", "label_smoothing", *OF_OTHER_LOSSES, *OF_REFERENCE)
        refuse_options(args, unused, "the oracle has a loss of its own and no reference")
        super().__init__(model, None, args, **options)

    def loss_at_head(
        self, states: Tensor, head: Head, labels: Tensor, constants: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`fastpref.oracle_loss`; the rejected half meets the reward head only."""
        targets = labels_of_states(labels, None, IGNORE_INDEX).chunk(2)[0]
        logps = linear_logps(states.chunk(2)[0], head, targets)
        rewards = self.rewards(states, labels)
        output = losses.oracle(
            sum_responses(logps, targets), rewards, sft_weight=self.args.sft_weight
        )
        logps, chosen, rejected = output[1:4]
        return output.loss, {
            "rewards/chosen": summed(chosen),
            "rewards/rejected": summed(rejected),
            "rewards/accuracies": summed((chosen > rejected).float()),
            "rewards/margins": summed(chosen - rejected),
            "logps/chosen": summed(logps.detach()),
            "loss/preference": summed(output.preference_loss),
            "loss/nll": summed(output.nll_loss),
        }
