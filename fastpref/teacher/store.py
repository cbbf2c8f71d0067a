"""Files of a precompute: batches that are done, and the dataset in the end.

Files are whole or absent. The dataset is one Parquet file, which carries what it was made with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import refuse
from fastpref.files import (
    SHA256,
    UNSEALED,
    check_seal,
    load_tensors,
    opened_tensors,
    seal,
    tensors_as_bytes,
    written,
)

if TYPE_CHECKING:
    import datasets

METADATA = b"fastpref"
ROWS = "rows"  # of the dataset, in a batch: beside its results
# Goes wherever a dataset goes, as a note on a column.
NOTE = "made by fastpref with "
Settings = Mapping[str, Any]
Columns = Callable[[range], dict[str, list[Tensor]]]  # of some rows: a tensor per row


class Place(NamedTuple):
    """Where the results of a row are."""

    batch: int
    position: int  # of its chosen response
    pairs: int  # in the batch: so much further on is its rejected response


class FinishedBatches:
    """The folder of batches that are done, ``<output>.partial``."""

    def __init__(self, output: Path) -> None:
        self.folder = _folder_of(output)

    def start(self, settings: Settings) -> None:
        """Make the folder, or go on with one that was made with the same settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "settings.json"
        if manifest.is_file():
            check_settings(manifest.parent, _read_json(manifest), settings)
        else:
            with written(manifest) as temporary:
                temporary.write_text(json.dumps(settings, indent=1), "utf-8")

    def save(self, number: int, rows: list[int], results: dict[str, Tensor]) -> None:
        """Keep the results of a batch of rows."""
        results = {**results, ROWS: torch.tensor(rows, dtype=torch.int32)}
        with written(self._file(number)) as temporary:
            temporary.write_bytes(tensors_as_bytes(results))

    def numbers(self) -> list[int]:
        """Which batches are done; the next may have any greater number."""
        files = self.folder.glob("batch-*.safetensors")
        return sorted(int(file.stem.removeprefix("batch-")) for file in files)

    def places(self) -> dict[int, Place]:
        """The rows that are done, and where."""
        found = {}
        for number in self.numbers():
            with self.open(number) as batch:
                rows = batch.get_tensor(ROWS).tolist()
            for position, row in enumerate(rows):
                found[row] = Place(number, position, len(rows))
        return found

    def check(self) -> None:
        """Refuse damaged files, all of them by name."""
        damaged = []
        for number in self.numbers():
            try:
                load_tensors(self._file(number))
            except ValueError as error:
                damaged.append(str(error))
        if damaged:
            advice = "Delete them and start again: no other batches are computed anew"
            raise ValueError(f"{'; '.join(damaged)}. {advice}")

    @contextmanager
    def open(self, number: int) -> Iterator[Any]:
        """Results of a batch that is done, of which parts can be read."""
        with opened_tensors(self._file(number)) as found:
            yield found

    def bytes_per_pair(self, places: Mapping[int, Place]) -> int:
        """Of the batch that takes most."""
        pairs = {place.batch: place.pairs for place in places.values()}
        sizes = (self._file(batch).stat().st_size // count for batch, count in pairs.items())
        return max(sizes)

    @classmethod
    def discard(cls, output: Path) -> None:
        """Delete the folder, when the dataset is written."""
        shutil.rmtree(_folder_of(output), ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"batch-{number:06d}.safetensors"


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Keep other runs from an output, and tidy up where there is nothing to go on with."""
    from filelock import FileLock, Timeout

    folder = _folder_of(output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "lock"
    lock = FileLock(file)  # of the operating system, which ends it with the process
    try:
        lock.acquire(blocking=False)
    except Timeout:
        refuse("output", f"{output} for one run at a time", "another that is writing it now")
    try:
        yield
    finally:
        if output.exists() or list(folder.iterdir()) == [file]:
            FinishedBatches.discard(output)
        lock.release()


def _folder_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


# Of what a digest stands for, its number says nothing to a reader.
_DIGESTS = {
    "rows_digest": "other rows, or other tokens of them",
    "columns_digest": "other columns beside the responses",
    "model_digest": "another teacher",
    "reference_model_digest": "another reference",
    "student_head_digest": "another student's head",
    "tokenizer_digest": "another tokenizer",
}


def check_settings(where: Path, found: Settings, expected: Settings) -> None:
    """Refuse results that were made with other settings than expected."""
    differences = [
        _DIGESTS.get(name) or f"{name} is {found.get(name)!r}, not {value!r}"
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

    dataset = dataset.remove_columns([one for one in features if one in dataset.column_names])
    # Arrow keeps the features of the dataset in the schema, where ours go beside them.
    schema = datasets.Features({**dataset.features, **features}).arrow_schema
    metadata = {**(schema.metadata or {}), METADATA: json.dumps(settings).encode()}
    schema = schema.with_metadata(metadata)
    start = 0
    with written(output, folder) as temporary:
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            for batch in dataset.with_format("arrow").iter(batch_size=step):
                added = columns(range(start, start + batch.num_rows))
                start += batch.num_rows
                for name in features:
                    batch = batch.append_column(name, _arrow(added[name]))
                writer.write_table(batch.cast(schema))
            writer.add_key_value_metadata({SHA256: UNSEALED})
        seal(temporary)


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
    """What a Parquet file written by `write_dataset` was made with; refused is a damaged one."""
    import pyarrow.parquet

    check_seal(file)
    try:
        metadata = pyarrow.parquet.read_schema(file).metadata or {}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: expected a whole Parquet file, got another ({error})") from error
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got a damaged file ({error})") from error
    return found
