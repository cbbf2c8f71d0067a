"""Reading preference rows, and saying which of them cannot be used."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastpref.checks import refuse
from fastpref.extras import require_extra

if TYPE_CHECKING:
    import datasets

RESPONSES = ("chosen", "rejected")
READ = ("prompt", *RESPONSES, "tools", "chat_template_kwargs")  # of a row, to make its tokens
SHOWN = 10
MISSING = " is missing"
SKIP = " (skip_bad_rows leaves them out)"


class BadRow(NamedTuple):
    """A row that cannot be used, by its position in the dataset."""

    row: int  #: its position, from 0
    reason: str  #: why it cannot be used


class BadRowsError(ValueError):
    """Rows that cannot be used; all of them are in ``rows``."""

    def __init__(
        self,
        bad: list[BadRow],
        argument: str = "dataset",
        advice: str = SKIP,
        *,
        rows: Sequence[Any] | None = None,
    ) -> None:
        self.rows = bad
        if rows is not None and len(bad) == len(rows):
            advice = ""  # nothing would be left
        super().__init__(f"{argument}: {describe(bad, rows)}{advice}")


def describe(bad: list[BadRow], rows: Sequence[Any] | None = None) -> str:
    """Name bad rows in a line: the first few with their reasons, and how many there are.

    Where all of a dataset's ``rows`` are bad for one reason, it is said once.
    """
    if rows is not None and len(bad) == len(rows) > 1 and len({one.reason for one in bad}) == 1:
        return f"all {len(rows)} rows: {bad[0].reason}{_columns_there(bad[0], rows)}"
    shown = "; ".join(f"row {row}: {reason}" for row, reason in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{len(bad)} bad row{'s' if len(bad) > 1 else ''}: {shown}{more}"


def _columns_there(bad: BadRow, rows: Sequence[Any]) -> str:
    """What rows have where a column is missing: it may have another name."""
    first = rows[bad.row]
    if not bad.reason.endswith(MISSING) or not isinstance(first, Mapping):
        return ""
    columns = [str(name) for name, value in first.items() if value is not None]
    return f"; their columns are {', '.join(columns) or 'empty'}"


def read_rows(source: str, split: str = "train") -> Iterable[Mapping[str, Any]]:
    """Rows of a JSON-lines, CSV or Parquet file, of a saved dataset, or of one on the Hub.

    JSON lines are read row by row, so that a row of another type spoils itself only.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a folder that
            ``save_to_disk`` wrote, or a name on the Hub.
        split: Of a saved dataset with several, or of one on the Hub. A file has none.

    Returns:
        A list of rows for JSON lines and CSV, a ``datasets.Dataset`` otherwise.

    Raises:
        ValueError: No such file or split, a file of another kind, or a line that is not JSON.
        ImportError: Without the extra "teacher"; JSON lines and CSV need no extra.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "pairs.jsonl")
        >>> _ = file.write_text('{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}')
        >>> read_rows(str(file))
        [{'prompt': '2 + 2 =', 'chosen': ' 4', 'rejected': ' 5'}]
    """
    path = Path(source)
    if _is_file(path, source):
        if not path.is_file():
            refuse("dataset", "a file that exists, a saved dataset or a name on the Hub", source)
        if path.suffix not in _READERS:
            refuse("dataset", f"a file that ends in {', '.join(_READERS)}", source)
        _check_no_split(split, "a file")
        return _READERS[path.suffix](path)
    require_extra("teacher", "fastpref.data.read_rows", "datasets")
    import datasets

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        with _reading(path, "a saved dataset"):
            saved = datasets.load_from_disk(source)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                refuse("split", f"one of {', '.join(saved)}", repr(split))
            saved = saved[split]
        else:
            _check_no_split(split, "this saved dataset")
        return saved  # type: ignore[no-any-return]  # untyped
    return datasets.load_dataset(source, split=split)  # type: ignore[no-any-return]  # untyped


def _is_file(path: Path, source: str) -> bool:
    """Whether a source is a file here, or can be nothing else: no name on the Hub looks like it."""
    if path.is_dir():
        return False
    elsewhere = path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2
    named = "/" not in source and path.suffix[1:].isalpha()
    return path.exists() or elsewhere or named or path.suffix in _READERS


def _check_no_split(split: str, what: str) -> None:
    """Refuse a split of something that has only one."""
    if split != "train":
        refuse("split", f'"train", since {what} has no other', repr(split))


def read_parquet(file: Path) -> datasets.Dataset:
    """One Parquet file as a dataset; refused is one that cannot be read.

    ``Dataset.from_parquet`` alone takes a name such as ``pairs[1].parquet`` for a pattern, and a
    file for another that had its name and its time of change, of which it keeps a copy.
    """
    require_extra("teacher", "fastpref.data.read_rows", "datasets")
    import datasets

    found = file.stat()
    identity = f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"
    with _reading(file, "a Parquet file"):
        return datasets.Dataset.from_parquet(glob.escape(str(file)), config_name=identity)


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """Name what cannot be read."""
    try:
        yield
    except Exception as error:  # damaged files fail in many ways
        reason = error.__cause__ or error
        raise ValueError(f"{path}: expected {expected}, cannot read it ({reason})") from error


def row_defect(row: object) -> str | None:
    """Why a row is no preference pair in TRL's standard or conversational format, or None."""
    if not isinstance(row, Mapping):
        return f"expected an object with chosen and rejected, got {type(row).__name__}"
    columns = (("prompt",) if "prompt" in row else ()) + RESPONSES
    for column in columns:
        if (defect := _text_defect(column, row.get(column))) is not None:
            return defect
    kinds = {isinstance(row[column], str) for column in columns}
    if len(kinds) > 1:
        return (
            "prompt, chosen and rejected must all be strings or all be lists of messages "
            "(drop a prompt that chosen and rejected repeat)"
        )
    for column in RESPONSES:
        value = row[column]
        if isinstance(value, str):
            empty = not value.strip()
        else:
            empty = not any(_says_something(message) for message in value)
        if empty:
            return f"{column} is empty"
    return None


def _text_defect(column: str, value: object) -> str | None:
    if value is None:
        return f"{column}{MISSING}"
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"{column} must be a string or a list of messages, got {type(value).__name__}"
    if not value and column == "prompt":
        return "prompt has no messages"
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"{column} must hold messages with role and content, got {str(message)[:60]!r}"
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            return f"{column} must hold messages of text, got content {str(content)[:60]!r}"
    return None


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def _read_json_lines(path: Path) -> list[Any]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line.decode("utf-8")))
                except ValueError as error:
                    raise ValueError(
                        f"dataset: expected a JSON object on line {number} of {path}: {error}"
                    ) from error
    # As in a table: what one row has and another lacks is None there.
    columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    return [{**columns, **row} if isinstance(row, dict) else row for row in rows]


def _read_csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file, _reading(path, "a CSV file"):
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                width = len(reader.fieldnames or ())
                raise ValueError(f"row {number} has other than {width} fields")
    return rows


_READERS: dict[str, Callable[[Path], Iterable[Mapping[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": read_parquet,
}
