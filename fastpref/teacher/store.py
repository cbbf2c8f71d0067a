"""Files of a precompute: batches that are done, and the dataset in the end.

Everything is written beside its place and moved there, so that a file is whole or absent. The
dataset is one Parquet file, which carries what it was made with.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets

METADATA = b"fastpref"
# Goes wherever a dataset goes, as a note on its columns of shaping.
MAX_LENGTH_NOTE = "made by fastpref with max_length="
Settings = Mapping[str, Any]


class FinishedBatches:
    """The folder of batches that are done, ``<output>.partial``."""

    def __init__(self, output: Path, settings: Settings) -> None:
        self.folder = self._folder(output)
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "settings.json"
        if manifest.is_file():
            check_settings(manifest.parent, json.loads(manifest.read_text("utf-8")), settings)
        else:
            _write_text(manifest, json.dumps(settings, indent=1))

    def has(self, number: int) -> bool:
        """Whether a batch is done."""
        return self._file(number).is_file()

    def save(self, number: int, results: dict[str, Tensor]) -> None:
        """Keep the results of a batch."""
        from safetensors.torch import save_file

        file = self._file(number)
        temporary = _beside(file)
        save_file(results, temporary)
        os.replace(temporary, file)

    def load(self, number: int) -> dict[str, Tensor]:
        """Results of a batch that is done."""
        from safetensors.torch import load_file

        return load_file(self._file(number))

    @classmethod
    def discard(cls, output: Path) -> None:
        """Delete the folder, when the dataset is written."""
        shutil.rmtree(cls._folder(output), ignore_errors=True)

    @staticmethod
    def _folder(output: Path) -> Path:
        return output.with_name(output.name + ".partial")

    def _file(self, number: int) -> Path:
        return self.folder / f"batch-{number:06d}.safetensors"


def check_settings(where: Path, found: Settings, expected: Settings) -> None:
    """Refuse results that were made with other settings than expected."""
    differences = [
        f"{name} is {found.get(name)!r}, not {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{where} was made with other settings: {'; '.join(differences)}. "
            "Use the same settings, another output, or delete it"
        )


def write_dataset(
    dataset: datasets.Dataset, output: Path, settings: Settings, folder: Path
) -> None:
    """Write a dataset and its settings as one Parquet file, first in a folder beside it."""
    import pyarrow.parquet

    temporary = folder / "dataset.parquet"
    # Arrow keeps the features of the dataset in the schema, where ours go beside them.
    schema = dataset.features.arrow_schema
    metadata = {**(schema.metadata or {}), METADATA: json.dumps(settings).encode()}
    schema = schema.with_metadata(metadata)
    with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for batch in dataset.with_format("arrow").iter(batch_size=1000):
            writer.write_table(batch.cast(schema))
    os.replace(temporary, output)


def read_settings(file: Path) -> dict[str, Any]:
    """What a Parquet file written by `write_dataset` was made with."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    if METADATA not in metadata:
        raise ValueError(f"{file}: expected a file written by fastpref, got one without settings")
    settings: dict[str, Any] = json.loads(metadata[METADATA])
    return settings


def shaping_feature(max_length: int | None) -> Any:
    """The type of a column of shaping, which remembers where sequences were cut."""
    import datasets

    return datasets.Value("float32", id=f"{MAX_LENGTH_NOTE}{max_length}")


def made_with_max_length(dataset: Any) -> tuple[bool, int | None]:
    """Whether a dataset's shaping says where its sequences were cut, and where they were."""
    feature = (dataset.features or {}).get("chosen_shaping")
    note = str(getattr(feature, "id", None))
    if not note.startswith(MAX_LENGTH_NOTE):
        return False, None
    number = note.removeprefix(MAX_LENGTH_NOTE)
    return True, None if number == "None" else int(number)


def to_float32(values: Tensor) -> Tensor:
    """Results as they are stored: float32 on the CPU."""
    return values.to("cpu", torch.float32).contiguous()


def _write_text(file: Path, text: str) -> None:
    temporary = _beside(file)
    temporary.write_text(text, "utf-8")
    os.replace(temporary, file)


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.{os.getpid()}.tmp")
