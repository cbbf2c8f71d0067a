"""Signals from files that ``fastpref values --per-token`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import refuse
from fastpref.data.tokens import tokenizer_settings
from fastpref.inspection.signals import Signal
from fastpref.teacher.precompute import load
from fastpref.teacher.shaping_columns import ShapingOptions
from fastpref.teacher.store import check_settings, read_settings

# What has to be the same for several files to be of the same pairs.
OF_ROWS = ("rows_digest", "skipped_rows", "model", "model_digest")


class Files(NamedTuple):
    """Datasets of the same rows, each with the values of one potential."""

    datasets: list[Any]
    settings: list[dict[str, Any]]

    @property
    def dataset(self) -> Any:
        """The rows, which are those of every file."""
        return self.datasets[0]

    @property
    def max_length(self) -> int | None:
        """Where the teacher's sequences were cut."""
        length: int | None = self.settings[0]["max_length"]
        return length

    @property
    def facts(self) -> dict[str, str]:
        """What the files were made with, for the page."""
        names = {"teacher": "model", "dtype": "dtype", "reference": "reference_model"}
        found = {name: value for settings in self.settings for name, value in settings.items()}
        return {fact: str(found[name]) for fact, name in names.items() if name in found}

    def signals(self, rows: list[int]) -> list[Signal]:
        """The signals of these rows."""
        return [
            _signal(dataset.select(rows), settings)
            for dataset, settings in zip(self.datasets, self.settings, strict=True)
        ]


def read_files(files: list[Path], tokenizer: Any) -> Files:
    """Read files, and hold them to the tokenizer and to each other."""
    if not files:
        refuse("files", "at least one file", "none")
    tokens = tokenizer_settings(tokenizer)
    del tokens["tokenizer"]  # its name: the same one may have been moved
    settings: list[dict[str, Any]] = []
    for file in files:
        if not file.is_file():
            refuse("files", "files that exist", repr(str(file)))
        found = read_settings(file)
        if not found.get("per_token"):
            refuse("files", "what fastpref values --per-token wrote", f"{file} without it")
        check_settings(file, found, tokens)
        check_settings(file, found, {name: (settings or [found])[0][name] for name in OF_ROWS})
        settings.append(found)
    names = [_name(found) for found in settings]
    if len(set(names)) < len(names):
        refuse("files", "files of different potentials or settings", ", ".join(names))
    return Files([load(file, {}) for file in files], settings)


def _name(settings: dict[str, Any]) -> str:
    """The potential, and what else of the shaping is not as usual."""
    usual = ShapingOptions()._asdict()
    unusual = [
        f"{name}={settings[name]}"
        for name, value in usual.items()
        if name != "potential" and settings.get(name, value) != value
    ]
    return ", ".join([settings["potential"], *unusual])


def _signal(dataset: Any, settings: dict[str, Any]) -> Signal:
    next_value = settings["form"] == "next_value"
    ends = settings["terminal"] == "zero" or next_value

    def curve(values: list[float]) -> Tensor:
        found = torch.tensor(values, dtype=torch.float64)
        if ends:
            found[-1] = 0
        return found

    sides = (dataset["chosen_values"], dataset["rejected_values"])
    curves = [(curve(one), curve(other)) for one, other in zip(*sides, strict=True)]
    return Signal(_name(settings), curves, settings["gamma"], 0.0 if next_value else 1.0)
