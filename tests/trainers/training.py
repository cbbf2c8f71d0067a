"""Short trainings of tiny models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_models import rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENIZER.pad_token = "<unk>"
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
OF_CLOCKS = ("runtime", "per_second", "flos")


def dataset(count: int = 8, **columns: list[float]) -> Dataset:
    found = Dataset.from_list(rows(count))
    for name, values in columns.items():
        found = found.add_column(name, values)
    return found


def numbers(seed: int, count: int = 8) -> list[float]:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()


def signal(name: str, count: int = 8) -> dict[str, list[float]]:
    return {f"chosen_{name}": numbers(1, count), f"rejected_{name}": numbers(2, count)}


def student(seed: int = 0, **options: Any) -> Any:
    return tiny_model(TOKENIZER, seed=seed, **options).train()


def teacher(seed: int = 7, **options: Any) -> Any:
    """Wider than the student, and with more columns than its tokenizer has tokens."""
    sizes = {"hidden_size": 24, "vocab_size": len(TOKENIZER) + 8}
    return tiny_model(TOKENIZER, seed=seed, **{**sizes, **options})


def models_for(method: str) -> dict[str, Any]:
    """What a trainer of this method is given beside the student."""
    found: dict[str, Any] = {}
    if method in ("dpo", "ipo", "wpo", "tdpo", "edpo", "kto"):
        found["ref_model"] = student(seed=5)
    if method in ("vanilla_kd", "gkd", "dckd", "adpa", "dpkd", "dpkd_token"):
        found |= {"teacher_model": teacher(), "teacher_processing_class": TOKENIZER}
    if method == "adpa":
        found["teacher_ref_model"] = teacher(seed=8, hidden_size=12)
    return found


def trainer(
    cls: Any, config: Any, folder: Path, model: Any, *, settings: dict | None = None, **options: Any
) -> Any:
    """A trainer that leaves the model that it is given as it is."""
    options = {"train_dataset": dataset(), "processing_class": TOKENIZER, **options}
    args = config(str(folder), **SETTINGS | (settings or {}))
    model = model if isinstance(model, str) else copy.deepcopy(model)
    torch.manual_seed(0)  # TRL 1.14 draws an adapter's weights before it seeds
    return cls(model, args=args, **options)


def history(trainer: Any, **options: Any) -> list[dict[str, float]]:
    """What was logged, without what depends on the clock."""
    trainer.train(**options)
    return [
        {name: value for name, value in entry.items() if not name.endswith(OF_CLOCKS)}
        for entry in trainer.state.log_history
    ]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Every number that is expected, to 1e-5 of it."""
    assert len(found) == len(expected)
    for entry, other in zip(found, expected, strict=True):
        for name, value in other.items():
            close = torch.tensor(value, dtype=torch.float64)
            torch.testing.assert_close(
                torch.tensor(entry[name], dtype=torch.float64),
                close,
                rtol=1e-5,
                atol=1e-5,
                msg=name,
            )
