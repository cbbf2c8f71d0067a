"""TVKD with TRL: a student learns from preference pairs, guided by a teacher's values.

    L = -log sigmoid(m_chosen - m_rejected),  m = beta * log p_student(y|x) - alpha * shaping(y)

where shaping(y) is what the teacher's value logsumexp(logits) gains over the response. In minutes
on a CPU, after `python examples/smollm2.py`:
    python examples/train_tvkd.py --config examples/smollm2_tvkd.yaml
The paper's recipe, on four GPUs:
    accelerate launch --num_processes 4 examples/train_tvkd.py --config examples/llama_tvkd.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import TrlParser

from fastpref.data import read_rows
from fastpref.integrations.trl import TVKDConfig, TVKDTrainer


@dataclass
class Arguments:
    """Models and pairs; everything else is an option of TVKDConfig."""

    student: str = field(metadata={"help": "A folder, or a name on the Hub."})
    teacher: str | None = field(
        default=None, metadata={"help": "The same; none if the pairs have columns of its shaping."}
    )
    dataset: str = field(
        default=str(Path(__file__).with_name("pairs.jsonl")),
        metadata={"help": "A .jsonl or .parquet file, or a name on the Hub."},
    )
    test_size: int = field(default=12, metadata={"help": "Pairs to evaluate on, not trained on."})
    trained_layers: int | None = field(
        default=None, metadata={"help": "Train only the last so many layers."}
    )


def main(argv: Sequence[str] | None = None) -> TVKDTrainer:
    """Train, evaluate and save the student."""
    args, config = TrlParser((Arguments, TVKDConfig)).parse_args_and_config(argv)
    pairs = Dataset.from_list([*read_rows(args.dataset)]).train_test_split(args.test_size, seed=0)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    if args.trained_layers is not None:
        student.requires_grad_(False)
        student.model.layers[-args.trained_layers :].requires_grad_(True)
    trainer = TVKDTrainer(
        student,
        args=config,
        teacher_model=args.teacher,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
    )
    trainer.train()  # logs rewards/margins, rewards/accuracies, shaping/chosen, ...
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
