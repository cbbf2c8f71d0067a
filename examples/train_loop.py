"""TVKD in a plain PyTorch loop. Run `python examples/smollm2.py` first: it writes both models."""

from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

import fastpref
from fastpref.data import read_rows
from fastpref.models import head_states, lm_head_of


@dataclass
class Arguments:
    """The defaults suit a CPU."""

    student: str = "examples/outputs/smollm2-4-layers"
    teacher: str = "examples/outputs/smollm2"  # with the student's tokenizer
    dataset: str = "examples/pairs.jsonl"
    test_size: int = 12
    beta: float = 0.01
    alpha: float = 0.7
    learning_rate: float = 1e-4
    batch_size: int = 4
    output_dir: str = "examples/outputs/smollm2-loop"


def main(argv: list[str] | None = None) -> None:
    """Train the student, print how it ranks the pairs held out, and save it."""
    (args,) = TrlParser(Arguments).parse_args_and_config(argv)
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    collate = partial(fastpref.collate_pairs, tokenizer=tokenizer)
    pairs, held = [*read_rows(args.dataset)], args.test_size
    test_loader = DataLoader(pairs[:held], args.batch_size, collate_fn=collate)
    loader = DataLoader(pairs[held:], args.batch_size, shuffle=True, collate_fn=collate)
    student.get_input_embeddings().requires_grad_(False)  # SmolLM2's head is the same matrix
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)

    def loss_of(batch: dict[str, torch.Tensor]) -> fastpref.LossOutput:
        labels = batch.pop("labels")  # which leaves input_ids and attention_mask
        with torch.no_grad():
            states = head_states(teacher, **batch)
            shaping = fastpref.teacher_shaping(states, lm_head_of(teacher), labels)
        states, head = head_states(student, **batch)[:, :-1], lm_head_of(student)
        return fastpref.tvkd_loss(states, head, labels, shaping, beta=args.beta, alpha=args.alpha)

    def evaluate(when: str) -> None:
        with torch.no_grad():
            outs = [loss_of(batch) for batch in test_loader]
        gaps = torch.cat([out.chosen_rewards - out.rejected_rewards for out in outs])
        print(f"{when}: margin {gaps.mean():.3f}, accuracy {(gaps > 0).float().mean():.0%}")

    evaluate("before training")
    for step, batch in enumerate(loader, 1):
        (loss := loss_of(batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} of {len(loader)}: loss {loss.item():.3f}", flush=True)
    evaluate("after training")
    student.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
