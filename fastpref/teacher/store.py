"""Files of a precompute: batches that are done, and the dataset in the end.

Everything is written beside its place and moved there, so that a file is whole or absent. The
dataset is one Parquet file, which carries what it was made with.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets

METADATA = b"fastpref"
# Goes wherever a dataset goes, as a note on a column.
NOTE = "made by fastpref with "
Settings = Mapping[str, Any]
Columns = Callable[[range], dict[str, list[Tensor]]]  # of some rows: a tensor per row


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

    def open(self, number: int) -> Any:
        """Results of a batch that is done, of which parts can be read."""
        from safetensors import safe_open

        return safe_open(self._file(number), framework="pt")

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
    dataset: datasets.Dataset,
    columns: Columns,
    features: Mapping[str, Any],
    output: Path,
    settings: Settings,
    folder: Path,
    *,
    step: int,
) -> None:
    """Write a dataset, new columns and settings as one Parquet file, first in a folder beside it.

    ``columns`` gives the values of a stretch of rows, ``step`` at once, ``features`` their types. A
    column of the dataset that has the name of a new one makes way for it.
    """
    import datasets
    import pyarrow.parquet

    temporary = folder / "dataset.parquet"
    dataset = dataset.remove_columns([one for one in features if one in dataset.column_names])
    # Arrow keeps the features of the dataset in the schema, where ours go beside them.
    schema = datasets.Features({**dataset.features, **features}).arrow_schema
    metadata = {**(schema.metadata or {}), METADATA: json.dumps(settings).encode()}
    schema = schema.with_metadata(metadata)
    start = 0
    with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for batch in dataset.with_format("arrow").iter(batch_size=step):
            added = columns(range(start, start + batch.num_rows))
            start += batch.num_rows
            for name in features:
                batch = batch.append_column(name, _arrow(added[name]))
            writer.write_table(batch.cast(schema))
    os.replace(temporary, output)


def _arrow(values: list[Tensor]) -> Any:
    """Tensors (), (n,) or (n, k), one of each row, as numbers, lists, or lists of lists."""
    import pyarrow

    found = pyarrow.array(torch.cat([one.reshape(-1) for one in values]).numpy())
    for level in reversed(range(values[0].dim())):
        lengths = (one.shape[level] for one in values for _ in range(math.prod(one.shape[:level])))
        offsets = pyarrow.array(list(accumulate(lengths, initial=0)), pyarrow.int32())
        found = pyarrow.ListArray.from_arrays(offsets, found)
    return found


def read_settings(file: Path) -> dict[str, Any]:
    """What a Parquet file written by `write_dataset` was made with."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    if METADATA not in metadata:
        raise ValueError(f"{file}: expected a file written by fastpref, got one without settings")
    settings: dict[str, Any] = json.loads(metadata[METADATA])
    return settings


def noted(dtype: str, **settings: Any) -> Any:
    """A type of numbers that remembers what they were made with."""
    import datasets

    return datasets.Value(dtype, id=NOTE + json.dumps(settings))


def note_of(dataset: Any, column: str) -> dict[str, Any] | None:
    """What a column of numbers, or of lists of them, remembers; None for columns of others."""
    feature: Any = (dataset.features or {}).get(column)
    while hasattr(feature, "feature"):  # of a list
        feature = feature.feature
    note = str(getattr(feature, "id", None))
    if not note.startswith(NOTE):
        return None
    settings: dict[str, Any] = json.loads(note.removeprefix(NOTE))
    return settings


def stored(values: Tensor) -> Tensor:
    """Results as they are stored: float32 or int32, on the CPU."""
    dtype = torch.float32 if values.is_floating_point() else torch.int32
    return values.to("cpu", dtype).contiguous()


def _write_text(file: Path, text: str) -> None:
    temporary = _beside(file)
    temporary.write_text(text, "utf-8")
    os.replace(temporary, file)


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.{os.getpid()}.tmp")
