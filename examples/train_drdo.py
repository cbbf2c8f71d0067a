"""DRDO with TRL, in two stages: an oracle that rewards responses, and a student that matches it.

    oracle:  L = -log sigmoid(r_chosen - r_rejected) + sft_weight * nll(chosen)
    student: L = (oracle's gap - student's gap)^2
                 - alpha * (1 - p)^gamma * log(p_student(chosen) / (1 - p_student(rejected)))

where gap = r_chosen - r_rejected and p = sigmoid(log p_student(chosen) - log p_student(rejected)).
In minutes on a CPU, after `python examples/smollm2.py`:
    python examples/train_drdo.py oracle --config examples/smollm2_oracle.yaml
    python examples/train_drdo.py student --config examples/smollm2_drdo.yaml
On GPUs: the same two commands under `accelerate launch`, with llama_oracle.yaml, llama_drdo.yaml.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import TrlParser

from fastpref.data import read_rows
from fastpref.integrations.trl import DRDOConfig, DRDOTrainer, OracleConfig, OracleTrainer

STAGES = {"oracle": (OracleTrainer, OracleConfig), "student": (DRDOTrainer, DRDOConfig)}


@dataclass
class Arguments:
    """Models and pairs; everything else is an option of OracleConfig or DRDOConfig."""

    model: str = field(metadata={"help": "What the stage trains: a folder or a name on the Hub."})
    oracle: str | None = field(
        default=None, metadata={"help": "Stage student: the folder that stage oracle wrote."}
    )
    dataset: str = field(default=str(Path(__file__).with_name("pairs.jsonl")))
    test_size: int = field(default=12, metadata={"help": "Pairs to evaluate on, not trained on."})
    trained_layers: int | None = field(default=None, metadata={"help": "The last so many only."})


def main(argv: Sequence[str] | None = None) -> Any:
    """Train, evaluate and save the model of one stage."""
    stage, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if stage not in STAGES:
        sys.exit(f"expected a stage first (oracle or student), got {stage!r}")
    trainer_class, config_class = STAGES[stage]
    args, config = TrlParser((Arguments, config_class)).parse_args_and_config(argv)
    pairs = Dataset.from_list([*read_rows(args.dataset)]).train_test_split(args.test_size, seed=0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.trained_layers is not None:
        model.requires_grad_(False)
        model.model.layers[-args.trained_layers :].requires_grad_(True)
    datasets = {"train_dataset": pairs["train"], "eval_dataset": pairs["test"]}
    oracle = {"oracle_model": args.oracle} if stage == "student" else {}
    trainer = trainer_class(model, args=config, **datasets, **oracle)
    trainer.train()  # logs rewards/margins, rewards/accuracies, rewards/oracle_margin, ...
    trainer.save_model()  # and reward_head.safetensors beside it
    return trainer


if __name__ == "__main__":
    main()
