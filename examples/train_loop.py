"""TVKD in a plain PyTorch loop: no trainer, one process, the teacher's shaping computed ahead.

python examples/train_loop.py --config examples/smollm2_loop.yaml --dataset pairs.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    SMOLLM2,
    ExampleArguments,
    fine_tune,
    load_pairs,
    load_student,
    load_tokenizer,
    model_source,
    peak_memory_mb,
    report,
)
from datasets import Dataset
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed
from trl import TrlParser

import fastpref
from fastpref.data.tokens import pad_pairs, tokenize_rows
from fastpref.models.fused_head import add_fused_head
from fastpref.teacher import add_shaping, load_teacher


@dataclass
class Arguments(ExampleArguments):
    """All that a plain loop needs."""

    teacher: str = field(default=SMOLLM2, metadata={"help": "As the student."})
    beta: float = field(default=0.01, metadata={"help": "Of `fastpref.tvkd_loss`."})
    alpha: float = field(default=0.7, metadata={"help": "Weight of the teacher's shaping."})
    max_length: int = field(default=1024, metadata={"help": "Cut sequences after so many tokens."})
    batch_size: int = field(default=4, metadata={"help": "Pairs a step."})
    epochs: int = field(default=1, metadata={"help": "Passes over the pairs."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Of AdamW, cosine decay."})
    seed: int = field(default=0, metadata={"help": "Of the order of the pairs."})
    output_dir: str = field(
        default="examples/outputs/loop", metadata={"help": "For model and plot."}
    )


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train, save, and show what happened; returns the history."""
    (args,) = TrlParser(Arguments).parse_args_and_config(argv)
    set_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args.student)
    train, held_out = with_shaping(args, *load_pairs(args, tokenizer, args.max_length))
    lengths = {"max_length": args.max_length, "seed": args.seed}
    student = fine_tune(load_student(args), args, train, tokenizer, **lengths).to(device)
    add_fused_head(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
    steps = args.epochs * -(-len(train) // args.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    history: list[dict[str, float]] = []
    for epoch in range(args.epochs):
        student.train()
        shuffled = train.shuffle(seed=args.seed + epoch)
        for batch in tqdm(batches(shuffled, tokenizer, args, device), desc=f"epoch {epoch + 1}"):
            out = run(student, batch, args)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history.append({"step": len(history) + 1, **measures([out])})
        student.eval()
        with torch.no_grad():
            outs = [
                run(student, batch, args) for batch in batches(held_out, tokenizer, args, device)
            ]
        history[-1] |= {f"eval_{name}": value for name, value in measures(outs).items()}
    student.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    report(history, args.output_dir, "TVKD, a plain loop")
    return history


def with_shaping(args: Arguments, *parts: Dataset) -> list[Dataset]:
    """Pairs with the teacher's shaping; the file stays, and is used again."""
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = load_teacher(model_source(args.teacher))
    files = [Path(args.output_dir) / f"{name}-shaping.parquet" for name in ("train", "eval")]
    return [
        add_shaping(part, teacher, tokenizer, file, max_length=args.max_length)
        for part, file in zip(parts, files, strict=True)
    ]


def batches(pairs: Dataset, tokenizer: Any, args: Arguments, device: torch.device) -> list[Any]:
    """Tokens, attention mask, labels and shaping of so many pairs, chosen rows first."""
    tokenized, _ = tokenize_rows(pairs, tokenizer, max_length=args.max_length, context_length=None)
    found = []
    for start in range(0, len(tokenized), args.batch_size):
        part = tokenized[start : start + args.batch_size]
        rows = pairs[[pair.row for pair in part]]
        shaping = torch.tensor(rows["chosen_shaping"] + rows["rejected_shaping"])
        found.append([tensor.to(device) for tensor in (*pad_pairs(part), shaping)])
    return found


def run(student: Any, batch: list[torch.Tensor], args: Arguments) -> fastpref.TVKDOutput:
    """The loss of a batch, computed where the student's head is: there are no logits."""
    tokens, attention, labels, shaping = batch
    options: dict[str, Any] = {"labels": labels, "shaping": shaping}
    options |= {"beta": args.beta, "alpha": args.alpha}

    def at_head(states: torch.Tensor, head: Any) -> dict[str, Any]:
        return {"out": fastpref.tvkd_loss(states[:, :-1], **options, **head._asdict())}

    return student(input_ids=tokens, attention_mask=attention, at_head=at_head)["out"]


def measures(outs: list[fastpref.TVKDOutput]) -> dict[str, float]:
    """Mean margin and accuracy of the student's rewards, and the peak so far."""
    margins = torch.cat([out.chosen_rewards - out.rejected_rewards for out in outs])
    return {
        "rewards/margins": margins.mean().item(),
        "rewards/accuracies": (margins > 0).float().mean().item(),
        "peak_memory_mb": peak_memory_mb(),
    }


if __name__ == "__main__":
    main()
