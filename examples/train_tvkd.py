"""TVKD with TRL: a student learns from preferences, shaped by the values of a teacher.

Here, with SmolLM2 as the teacher and its first layers as the student, in minutes on a CPU:
    python examples/train_tvkd.py --config examples/smollm2_tvkd.yaml --dataset pairs.jsonl
The paper's recipe, on four GPUs:
    accelerate launch --num_processes 4 examples/train_tvkd.py --config examples/llama_tvkd.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common import (
    SMOLLM2,
    ExampleArguments,
    PeakMemory,
    fine_tune,
    load_pairs,
    load_student,
    load_tokenizer,
    model_source,
    report,
)
from trl import TrlParser

from fastpref.integrations.trl import TVKDConfig, TVKDTrainer


@dataclass
class Arguments(ExampleArguments):
    """The teacher beside them."""

    teacher: str = field(
        default=SMOLLM2,
        metadata={"help": 'As the student; "" where the pairs have columns of `fastpref values`.'},
    )


def main(argv: Sequence[str] | None = None) -> TVKDTrainer:
    """Train, save, and show what happened."""
    args, config = TrlParser((Arguments, TVKDConfig)).parse_args_and_config(argv)
    tokenizer = load_tokenizer(args.student)
    train, held_out = load_pairs(args, tokenizer, config.max_length)
    lengths = {"max_length": config.max_length, "seed": config.seed}
    student = fine_tune(load_student(args), args, train, tokenizer, **lengths)
    trainer = TVKDTrainer(
        student,
        args=config,
        teacher_model=model_source(args.teacher) if args.teacher else None,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[PeakMemory()],
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(trainer.state.log_history, config.output_dir, "TVKD")
    return trainer


if __name__ == "__main__":
    main()
