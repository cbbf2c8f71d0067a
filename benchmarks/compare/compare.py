"""TVKD, DRDO, DPO and SimPO on the same pairs: held-out accuracy and margin over seeds.

python examples/smollm2.py  # once: writes the teacher, which the student is cut from
python benchmarks/compare/compare.py --config benchmarks/compare/compare.yaml --dataset pairs.jsonl

Every finished run is written at once: a comparison that was stopped resumes where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # SimPO's trainer is there, and we know it

import matplotlib

matplotlib.use("Agg")  # the plot is a file: no display is needed
import torch
from datasets import Dataset
from students import fine_tune, load_pairs, load_student, plain_options, train_last_layers
from summary import describe_run, plot, show, summarize
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.scripts.utils import TrlParser
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from fastpref import collate_pairs, linear_logps, sequence_rewards, sum_responses
from fastpref.integrations.trl import (
    DRDOConfig,
    DRDOTrainer,
    OracleConfig,
    OracleTrainer,
    TVKDConfig,
    TVKDTrainer,
)
from fastpref.models import head_states, lm_head_of
from fastpref.teacher import add_shaping, load_teacher

HERE = Path(__file__).parent
SIDES = ("chosen", "rejected")
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
class Arguments:
    """The same for all methods."""

    dataset: str = field(metadata={"help": "Conversational pairs: a .jsonl file, or a Hub name."})
    student: str = field(metadata={"help": "A folder, or a Hub name."})
    teacher: str = field(metadata={"help": "The same; also what the oracle starts from."})
    student_layers: int | None = field(
        default=None, metadata={"help": "Keep so many of the student's first layers."}
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Train neither the embeddings nor the head."}
    )
    sft_steps: int = field(
        default=0, metadata={"help": "Steps of SFT on all responses before all else."}
    )
    sft_learning_rate: float = field(default=1e-3, metadata={"help": "Of these steps."})
    held_out: int = field(default=64, metadata={"help": "Pairs kept from training, to evaluate."})
    max_pairs: int | None = field(default=None, metadata={"help": "Use so many pairs at most."})
    max_prompt_length: int = field(
        default=128, metadata={"help": "Leave out the oldest turns of a longer prompt."}
    )
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
    batch_size: int = field(default=4, metadata={"help": "Pairs per step."})
    epochs: int = field(default=1, metadata={"help": "Of every method."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of every method."})
    work: str = field(
        default=str(HERE / "outputs"), metadata={"help": "A folder for what runs share."}
    )
    output: str = field(
        default=str(HERE / "results" / "compare.json"),
        metadata={"help": "The plot goes beside it."},
    )

    def trainer_options(self, epochs: int, learning_rate: float, seed: int) -> dict[str, Any]:
        """Options of every trainer."""
        return {
            "num_train_epochs": epochs,
            "seed": seed,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": learning_rate,
            "max_length": self.max_length,
            **plain_options(),
        }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, then print and plot; returns what is in the file."""
    (args,) = TrlParser(cast(Any, Arguments)).parse_args_and_config(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, held_out = load_pairs(
        args.dataset,
        tokenizer,
        max_prompt_length=args.max_prompt_length,
        max_pairs=args.max_pairs,
        held_out=args.held_out,
    )
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
    names = {name: Path(getattr(args, name)).name for name in ("dataset", "student", "teacher")}
    settings = asdict(args) | names
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
    teacher, tokenizer = load_teacher(args.teacher)
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
        model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
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
        student = load_student(
            args.student, layers=args.student_layers, freeze_embeddings=args.freeze_embeddings
        )
        if args.sft_steps:
            fine_tune(
                student,
                train,
                tokenizer,
                max_steps=args.sft_steps,
                learning_rate=args.sft_learning_rate,
                per_device_train_batch_size=4,
                max_length=args.max_length,
                seed=seed,
            )
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
    start = partial(load_student, folder, layers=None, freeze_embeddings=args.freeze_embeddings)
    student = start()
    before = {name: measures(student, tokenizer, args, part) for name, part in parts.items()}
    for method in methods:
        student = start()
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
    columns = [f"{side}_{signal}" for side in SIDES] if signal else []
    options = options | args.trainer_options(args.epochs, args.learning_rate, seed)
    cls(
        student,
        args=config(str(Path(args.work) / method), **options),
        train_dataset=train.select_columns(["prompt", *SIDES, *columns]),
        processing_class=tokenizer,
    ).train()


@torch.no_grad()
def measures(model: Any, tokenizer: Any, args: Arguments, pairs: Dataset) -> dict[str, Tensor]:
    """(n, 2) of chosen and rejected: summed and mean log-probability, reward of a linear head."""
    model.eval()
    collate = partial(collate_pairs, tokenizer=tokenizer, max_length=args.max_length)
    rows = pairs.select_columns(["prompt", *SIDES])
    found: list[dict[str, Tensor]] = []
    for batch in DataLoader(rows, batch_size=args.batch_size, collate_fn=collate):
        inputs = {name: values.to(model.device) for name, values in batch.items()}
        labels = inputs.pop("labels")
        states = head_states(model, **inputs)
        responses = sum_responses(linear_logps(states[:, :-1], lm_head_of(model), labels), labels)
        results = {"logp": responses.logps, "mean_logp": responses.logps / responses.lengths}
        if hasattr(model, "reward_head"):
            results["reward"] = sequence_rewards(states, labels, model.reward_head.weight)
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
    return ranked(torch.tensor([pairs[f"{side}_{signal}"] for side in SIDES]).T)


def write(file: Path, report: dict[str, Any]) -> None:
    """Replace a file as a whole: a killed process leaves the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    unfinished.replace(file)


if __name__ == "__main__":
    main()
