"""DRDO with TRL, in two stages: an oracle that rewards responses, a student that matches it.

Here, with SmolLM2 as the oracle and its first layers as the student, in minutes on a CPU:
    python examples/train_drdo.py oracle --config examples/smollm2_oracle.yaml --dataset pairs.jsonl
    python examples/train_drdo.py student --config examples/smollm2_drdo.yaml --dataset pairs.jsonl
With llama_oracle.yaml and llama_drdo.yaml, under `accelerate launch`, it is the real recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import (
    ExampleArguments,
    PeakMemory,
    fine_tune,
    load_pairs,
    load_student,
    load_tokenizer,
    report,
)
from trl import TrlParser

from fastpref.integrations.trl import DRDOConfig, DRDOTrainer, OracleConfig, OracleTrainer

CONFIGS = {"oracle": OracleConfig, "student": DRDOConfig}


@dataclass
class Arguments(ExampleArguments):
    """What the two stages have beside them."""

    oracle: str | None = field(
        default=None, metadata={"help": "Stage student: the folder that stage oracle wrote."}
    )
    trained_layers: int | None = field(
        default=None, metadata={"help": "Train the last so many layers only (and the reward head)."}
    )


def train_last_layers(model: Any, count: int) -> None:
    """Freeze all but a model's last layers."""
    model.requires_grad_(False)
    model.get_decoder().layers[-count:].requires_grad_(True)


def main(argv: Sequence[str] | None = None) -> OracleTrainer | DRDOTrainer:
    """Train a stage, save its model, and show what happened."""
    argv = sys.argv[1:] if argv is None else argv
    stage = argv[0] if argv else ""
    if stage not in CONFIGS:
        sys.exit(f"expected a stage first ({' or '.join(CONFIGS)}), got {stage!r}")
    args, config = TrlParser((Arguments, CONFIGS[stage])).parse_args_and_config(argv[1:])
    tokenizer = load_tokenizer(args.student)
    train, held_out = load_pairs(args, tokenizer, config.max_length)
    lengths = {"max_length": config.max_length, "seed": config.seed}
    model = fine_tune(load_student(args), args, train, tokenizer, **lengths)
    if args.trained_layers is not None:
        train_last_layers(model, args.trained_layers)
    options: dict[str, Any] = {
        "args": config,
        "train_dataset": train,
        "eval_dataset": held_out,
        "processing_class": tokenizer,
        "callbacks": [PeakMemory()],
    }
    trainer: OracleTrainer | DRDOTrainer
    if stage == "oracle":
        trainer = OracleTrainer(model, **options)
    else:
        trainer = DRDOTrainer(model, oracle_model=args.oracle, **options)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(trainer.state.log_history, config.output_dir, f"DRDO: {stage}")
    return trainer


if __name__ == "__main__":
    main()
