"""TVKD in a plain loop of accelerate. The pairs have a teacher's shaping, so no teacher is needed.

On one process: python examples/recipes/accelerate_loop.py --student ... --dataset ...
On two CPU processes: torchrun --nproc_per_node 2 examples/recipes/accelerate_loop.py --cpu ...
"""

from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

import fastpref
from fastpref.data import read_rows
from fastpref.models import add_fused_head


@dataclass
class Arguments:
    """`dataset` is a file that `fastpref values` wrote."""

    student: str = "examples/outputs/smollm2-4-layers"
    dataset: str = "pairs-with-values.parquet"
    output_dir: str = "examples/outputs/smollm2-accelerate"
    batch_size: int = 2  # pairs, on each process
    accumulation_steps: int = 2
    learning_rate: float = 1e-4
    cpu: bool = False


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train for one epoch; return loss, margin and accuracy of every optimizer step."""
    (args,) = TrlParser(Arguments).parse_args_and_config(argv)
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulation_steps)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    add_fused_head(student)  # before prepare wraps the model
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
    collate = partial(fastpref.collate_pairs, tokenizer=tokenizer)
    pairs = [*read_rows(args.dataset)]
    loader = DataLoader(pairs, args.batch_size, collate_fn=collate, drop_last=True)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    history, losses, margins = [], [], []
    for batch in loader:
        labels, shaping = batch.pop("labels"), batch.pop("shaping")
        outs = []

        def at_head(states, head, labels=labels, shaping=shaping, outs=outs):
            out = fastpref.tvkd_loss(states[:, :-1], head, labels, shaping, beta=0.01, alpha=0.7)
            outs.append(out)
            return {"loss": out.loss}

        with accelerator.accumulate(student):
            # backward() divides by accumulation_steps, which is right for a mean over pairs
            accelerator.backward(student(**batch, at_head=at_head)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        (out,) = outs
        losses.append(accelerator.reduce(out.loss.detach(), "mean"))
        margins.append(accelerator.gather_for_metrics(out.chosen_rewards - out.rejected_rewards))
        if accelerator.sync_gradients:
            found = torch.cat(margins)
            history.append({
                "loss": torch.stack(losses).mean().item(),
                "rewards/margins": found.mean().item(),
                "rewards/accuracies": (found > 0).float().mean().item(),
            })  # fmt: skip
            accelerator.print(history[-1])
            losses, margins = [], []
    bare = accelerator.unwrap_model(student)
    bare.save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
    return history


if __name__ == "__main__":
    main()
