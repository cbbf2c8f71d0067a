"""TVKD, DRDO, DPO and SimPO on the same pairs: held-out accuracy and margin over seeds.

python examples/compare.py --config examples/compare.yaml --dataset pairs.jsonl

Every finished run is written at once, so that a killed comparison goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # SimPO's trainer is there, and we know it

import torch
from common import (
    SMOLLM2,
    ExampleArguments,
    fine_tune,
    load_pairs,
    load_student,
    load_tokenizer,
    model_source,
    plain_options,
)
from compare_report import describe_run, plot, show, summarize
from datasets import Dataset
from torch import Tensor
from train_drdo import train_last_layers
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, TrlParser
from trl.experimental.cpo import CPOConfig, CPOTrainer

from fastpref import linear_logps
from fastpref.data.tokens import IGNORE_INDEX, pad_pairs, tokenize_rows
from fastpref.integrations.trl import (
    DRDOConfig,
    DRDOTrainer,
    OracleConfig,
    OracleTrainer,
    TVKDConfig,
    TVKDTrainer,
)
from fastpref.integrations.trl.columns import columns_of
from fastpref.models.fused_head import add_fused_head
from fastpref.models.reward_head import rewards_at_head
from fastpref.teacher import add_shaping, load_teacher

# SimPO's own advice is a margin of half its beta, and no likelihood term (cpo_alpha).
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "TVKD": (TVKDTrainer, TVKDConfig, {"beta": 0.01, "alpha": 0.7}),
    "DRDO": (DRDOTrainer, DRDOConfig, {"alpha": 0.1, "gamma": 2.0, "length_normalize": True}),
    "DPO": (DPOTrainer, DPOConfig, {"beta": 0.1}),
    "SimPO": (
        CPOTrainer,
        CPOConfig,
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
}


@dataclass
class Arguments(ExampleArguments):
    """The same for all methods."""

    teacher: str = field(default=SMOLLM2, metadata={"help": "Also what the oracle starts from."})
    oracle_layers: int = field(
        default=2, metadata={"help": "Train the oracle's last so many layers, and a reward head."}
    )
    oracle_epochs: int = field(default=1, metadata={"help": "Of the oracle."})
    oracle_learning_rate: float = field(default=1e-4, metadata={"help": "Of the oracle."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run each."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "Which of them."}
    )
    checked: int = field(
        default=32, metadata={"help": "Pairs trained on that are measured like those held out."}
    )
    max_length: int = field(default=192, metadata={"help": "Cut sequences after so many tokens."})
    batch_size: int = field(default=4, metadata={"help": "Pairs a step."})
    epochs: int = field(default=1, metadata={"help": "Of every method."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of every method."})
    work: str = field(default="examples/outputs/compare", metadata={"help": "For what runs share."})
    output: str = field(
        default="examples/results/compare.json", metadata={"help": "The plot goes beside it."}
    )

    def trainer_options(self, epochs: int, learning_rate: float, seed: int) -> dict[str, Any]:
        """Options of every trainer."""
        return {
            "num_train_epochs": epochs,
            "seed": seed,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "max_length": self.max_length,
            **plain_options(),
        }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, then print and plot; returns what is in the file."""
    (args,) = TrlParser(Arguments).parse_args_and_config(argv)
    tokenizer = load_tokenizer(args.student)
    train, held_out = load_pairs(args, tokenizer, args.max_length)
    report = begin_report(args, len(train), len(held_out))
    train, held_out = with_shaping(args, train, held_out)
    train, held_out = with_rewards(args, tokenizer, train, held_out)
    report["signals"] = {
        name: {"train": ranked_columns(train, column), "held_out": ranked_columns(held_out, column)}
        for name, column in (("teacher's shaping", "shaping"), ("oracle's reward", "reward"))
    }
    for seed in args.seeds:
        done = {run["method"] for run in report["runs"] if run["seed"] == seed}
        missing = [method for method in args.methods if method not in done]
        for run in runs_of_seed(args, tokenizer, train, held_out, missing, seed):
            report["runs"].append(run)
            write(Path(args.output), report)
    report["summary"] = summarize(report["runs"])
    write(Path(args.output), report)
    show(report)
    plot(report, Path(args.output).with_suffix(".png"))
    return report


def begin_report(args: Arguments, train: int, held_out: int) -> dict[str, Any]:
    """What is done already; another comparison's file is refused."""
    settings = asdict(args) | {"dataset": Path(args.dataset).name}
    for name in ("work", "output", "seeds", "methods"):
        del settings[name]
    settings |= {"methods": {name: options for name, (_, _, options) in METHODS.items()}}
    report = {
        **describe_run(),
        "settings": settings,
        "trained_pairs": train,
        "pairs": {"train": min(args.checked, train), "held_out": held_out},
        "runs": [],
    }
    output, shared = Path(args.output), Path(args.work) / "settings.json"
    for file in (output, shared):
        if file.exists():
            old = json.loads(file.read_text("utf-8"))
            if old["settings"] != settings:
                raise SystemExit(f"{file} is of other settings: choose another --output and --work")
            report["runs"] = old.get("runs", report["runs"])
    write(shared, {"settings": settings})
    return report


def with_shaping(args: Arguments, *parts: Dataset) -> list[Dataset]:
    """Pairs with the teacher's shaping."""
    teacher, tokenizer = load_teacher(model_source(args.teacher))
    Path(args.work).mkdir(parents=True, exist_ok=True)
    files = [Path(args.work) / f"shaping-{number}.parquet" for number in range(len(parts))]
    return [
        add_shaping(part, teacher, tokenizer, file, max_length=args.max_length)
        for part, file in zip(parts, files, strict=True)
    ]


def with_rewards(args: Arguments, tokenizer: Any, *parts: Dataset) -> list[Dataset]:
    """Pairs with the rewards of an oracle that was trained on the first part."""
    folder = Path(args.work) / "oracle"
    files = [Path(args.work) / f"rewards-{number}.parquet" for number in range(len(parts))]
    if not all(file.exists() for file in files):
        model = AutoModelForCausalLM.from_pretrained(
            model_source(args.teacher), dtype=torch.float32
        )
        train_last_layers(model, args.oracle_layers)
        options = args.trainer_options(args.oracle_epochs, args.oracle_learning_rate, seed=0)
        config = OracleConfig(str(folder), **options)
        trainer = OracleTrainer(
            model, args=config, train_dataset=parts[0], processing_class=tokenizer
        )
        trainer.train()
        for part, file in zip(parts, files, strict=True):
            chosen, rejected = measures(model, tokenizer, args, part)["reward"].T.tolist()
            part = part.add_column("chosen_reward", chosen)
            part.add_column("rejected_reward", rejected).to_parquet(file)
    return [Dataset.from_parquet(str(file)) for file in files]


def sft_student(args: Arguments, tokenizer: Any, train: Dataset, seed: int) -> str:
    """The folder of the student that all methods of a seed start from."""
    folder = Path(args.work) / f"sft-{seed}"
    if not folder.exists():
        student = load_student(args)
        fine_tune(student, args, train, tokenizer, max_length=args.max_length, seed=seed)
        student.save_pretrained(folder.with_suffix(".unfinished"))
        folder.with_suffix(".unfinished").rename(folder)
    return str(folder)


def runs_of_seed(
    args: Arguments,
    tokenizer: Any,
    train: Dataset,
    held_out: Dataset,
    methods: list[str],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Train each method from the same student, and measure it on both parts."""
    if not methods:
        return
    folder = sft_student(args, tokenizer, train, seed)
    parts = {"train": train.select(range(min(args.checked, len(train)))), "held_out": held_out}
    begin = replace(args, student=folder, student_layers=None)
    student = load_student(begin)
    before = {name: measures(student, tokenizer, args, part) for name, part in parts.items()}
    for method in methods:
        student = load_student(begin)
        began = time.perf_counter()
        train_method(method, student, args, tokenizer, train, seed)
        run = {"method": method, "seed": seed, "seconds": time.perf_counter() - began}
        for name, part in parts.items():
            run[name] = compared(measures(student, tokenizer, args, part), before[name])
        yield run


def train_method(
    method: str, student: Any, args: Arguments, tokenizer: Any, train: Dataset, seed: int
) -> None:
    """Train a student in place."""
    cls, config, options = METHODS[method]
    signal = {"TVKD": "shaping", "DRDO": "reward"}.get(method)
    columns = columns_of(signal) if signal else ()
    options = options | args.trainer_options(args.epochs, args.learning_rate, seed)
    cls(
        student,
        args=config(str(Path(args.work) / method), **options),
        train_dataset=train.select_columns(["prompt", "chosen", "rejected", *columns]),
        processing_class=tokenizer,
    ).train()


@torch.no_grad()
def measures(model: Any, tokenizer: Any, args: Arguments, pairs: Dataset) -> dict[str, Tensor]:
    """(n, 2) of chosen and rejected: summed and mean log-probability, reward of a linear head."""
    model.eval()
    add_fused_head(model)
    tokenized, _ = tokenize_rows(pairs, tokenizer, max_length=args.max_length, context_length=None)
    found: list[dict[str, Tensor]] = []
    for first in range(0, len(tokenized), args.batch_size):
        batch = tokenized[first : first + args.batch_size]
        tokens, attention, labels = (part.to(model.device) for part in pad_pairs(batch))

        def at_head(states: Tensor, head: Any, labels: Tensor = labels) -> dict[str, Tensor]:
            logps = linear_logps(states[:, :-1], labels=labels, **head._asdict()).sum(1)
            results = {"logp": logps, "mean_logp": logps / (labels != IGNORE_INDEX).sum(1)}
            if hasattr(model, "reward_head"):
                results["reward"] = rewards_at_head(model, states, labels)
            return results

        results = model(input_ids=tokens, attention_mask=attention, at_head=at_head)
        found.append({name: each.view(2, -1).T.cpu() for name, each in results.items()})
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def compared(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, float]:
    """How a method ranks pairs: by what it added to log-probabilities, by these, by its head."""
    rankings = {
        "implicit": after["logp"] - before["logp"],
        "mean_logp": after["mean_logp"],
        "mean_logp_before": before["mean_logp"],
    }
    if "reward" in after:
        rankings["head"] = after["reward"]
    return {
        f"{name}_{measure}": value
        for name, rewards in rankings.items()
        for measure, value in ranked(rewards).items()
    }


def ranked(rewards: Tensor) -> dict[str, float]:
    """Accuracy and mean margin of (n, 2) rewards."""
    margins = rewards[:, 0] - rewards[:, 1]
    return {"accuracy": (margins > 0).float().mean().item(), "margin": margins.mean().item()}


def ranked_columns(pairs: Dataset, signal: str) -> dict[str, float]:
    """The same of a signal that the pairs hold."""
    return ranked(torch.tensor([pairs[column] for column in columns_of(signal)]).T)


def write(file: Path, report: dict[str, Any]) -> None:
    """Replace a file as a whole: a killed process leaves the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    unfinished.replace(file)


if __name__ == "__main__":
    main()
