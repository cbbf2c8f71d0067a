"""What `errors.py` shows: tables in Markdown, made from its JSON file alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from error_primitives import FASTPREF, PRIMITIVES

ERRORS = ("value", "hidden", "head")
ROUNDED = "float64, rounded once"
EQUAL = 1.05  # times the smallest error counts as equal to it
LOGPS = PRIMITIVES[0].name
Row = dict[str, Any]


class Larger(NamedTuple):
    """An error of fastpref's that is larger than the smallest of all others."""

    primitive: str
    dtype: str
    inputs: str
    error: str
    ours: float
    smallest: float
    by: str


def markdown(path: Path) -> str:
    """Every error of a JSON file."""
    report = json.loads(path.read_text("utf-8"))
    rows: list[Row] = report["rows"]
    parts = [
        "# Rounding errors\n\n"
        "`make errors` writes this file. Errors of values, of the gradient of the hidden states "
        "and of that of the head,\nrelative to float64 with full logits. "
        f"`{ROUNDED}` is the least that the returned dtype allows.\n"
    ]
    for dtype in _each(rows, "dtype"):
        some = [row for row in rows if row["dtype"] == dtype]
        inputs = _each(some, "inputs")
        body = [
            [f"**{primitive}**" if first else "", by, *cells]
            for primitive in _each(some, "primitive")
            for first, by, cells in _by_inputs(some, primitive, inputs)
        ]
        parts.append(f"## {dtype}\n\n" + _table(["", "", *inputs], body))
    return "\n".join(parts)


def _by_inputs(
    rows: list[Row], primitive: str, inputs: list[str]
) -> Iterator[tuple[bool, str, list[str]]]:
    of_primitive = [row for row in rows if row["primitive"] == primitive]
    for number, by in enumerate(_each(of_primitive, "by")):
        found = {row["inputs"]: row for row in of_primitive if row["by"] == by}
        yield number == 0, by, [_cell(found.get(name)) for name in inputs]


def tables_of_docs(rows: list[Row]) -> list[str]:
    """Those of docs/rounding_errors.md: log-probs by everybody, all functions, exceptions."""
    flat, *_, last = _each(rows, "inputs")
    shown = [(dtype, inputs) for dtype in ("float32", "bfloat16") for inputs in (flat, last)]
    return [contenders(rows, shown), overview(rows, last), exceptions(rows)]


def overview(rows: list[Row], inputs: str) -> str:
    """Of one batch: fastpref's errors, and the smallest of all others, for every primitive."""
    rows = [row for row in rows if row["inputs"] == inputs]
    dtypes = _each(rows, "dtype")
    header = [""] + [f"{dtype}, {who}" for dtype in dtypes for who in (FASTPREF, "others' best")]
    body = [
        [primitive]
        + [
            _numbers(pick(rows, dtype, inputs, primitive))
            for dtype in dtypes
            for pick in (_ours, _smallest)
        ]
        for primitive in _each(rows, "primitive")
    ]
    return _table(header, body)


def contenders(rows: list[Row], batches: list[tuple[str, str]]) -> str:
    """The log-probabilities of some batches, each a dtype and its inputs, by everybody."""
    rows = [row for row in rows if row["primitive"] == LOGPS]
    body = [
        [by] + [_cell(_find(rows, dtype=dtype, inputs=inputs, by=by)) for dtype, inputs in batches]
        for by in _each(rows, "by")
    ]
    return _table(["log-probs", *(f"{inputs}, {dtype}" for dtype, inputs in batches)], body)


def exceptions(rows: list[Row]) -> str:
    """Where fastpref's error is not the smallest, nor equal to it."""
    body = [
        [
            one.primitive, one.dtype, one.inputs, one.error, _number(one.ours),
            _number(one.smallest), f"{one.ours / one.smallest:.2f}", one.by,
        ]
        for one in larger_errors(rows)
    ]  # fmt: skip
    header = ["", "dtype", "inputs", "error of", FASTPREF, "smallest", "times", "by"]
    return _table(header, body)


def larger_errors(rows: list[Row]) -> list[Larger]:
    """Every error of fastpref's that is more than `EQUAL` times the smallest of all others."""
    found = []
    for row in rows:
        if row["by"] != FASTPREF:
            continue
        others = _others(rows, row["dtype"], row["inputs"], row["primitive"])
        for error in ERRORS:
            known = [(one[error], one["by"]) for one in others if one[error] is not None]
            if row[error] is None or not known:
                continue
            smallest, by = min(known)
            if not row[error] <= EQUAL * smallest:
                where = row["primitive"], row["dtype"], row["inputs"], error
                found.append(Larger(*where, row[error], smallest, by))
    return found


def summary(path: Path) -> str:
    """What the command prints."""
    report = json.loads(path.read_text("utf-8"))
    rows: list[Row] = report["rows"]
    compared = sum(
        row[error] is not None for row in rows if row["by"] == FASTPREF for error in ERRORS
    )
    worse = larger_errors(rows)
    reasons = {f"{row['by']} {row['status']}: {row['reason']}" for row in rows if row["reason"]}
    return "\n".join(
        [
            contenders(rows, [(one["dtype"], one["inputs"]) for one in _batches(rows)]),
            f"{len(worse)} of fastpref's {compared} errors are more than {EQUAL} times the "
            f"smallest of all others:\n",
            exceptions(rows),
            *sorted(reasons),
            f"{report['seconds']} s, at most {report['peak_gb']} GB.",
        ]
    )


def _batches(rows: list[Row]) -> list[Row]:
    unique = {(row["dtype"], row["inputs"]): row for row in rows}
    return list(unique.values())


def _find(rows: list[Row], **wanted: str) -> Row | None:
    fits = (row for row in rows if all(row[key] == one for key, one in wanted.items()))
    return next(fits, None)


def _others(rows: list[Row], dtype: str, inputs: str, primitive: str) -> list[Row]:
    """What fastpref is compared with: its own other ways and the bound are not."""
    return [
        row
        for row in rows
        if (row["dtype"], row["inputs"], row["primitive"]) == (dtype, inputs, primitive)
        and not row["by"].startswith(FASTPREF)
        and row["by"] != ROUNDED
    ]


def _ours(rows: list[Row], dtype: str, inputs: str, primitive: str) -> list[float | None]:
    row = _find(rows, dtype=dtype, inputs=inputs, primitive=primitive, by=FASTPREF)
    return [None if row is None else row[error] for error in ERRORS]


def _smallest(rows: list[Row], dtype: str, inputs: str, primitive: str) -> list[float | None]:
    others = _others(rows, dtype, inputs, primitive)
    return [
        min((row[error] for row in others if row[error] is not None), default=None)
        for error in ERRORS
    ]


def _each(rows: list[Row], key: str) -> list[str]:
    """What there is, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return row["status"] if row["status"] != "ok" else _numbers([row[error] for error in ERRORS])


def _numbers(errors: list[float | None]) -> str:
    """Three numbers, or those that there are: what a frozen head or a statistic has none of."""
    while errors and errors[-1] is None:
        errors = errors[:-1]
    return " · ".join(map(_number, errors))


def _number(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}".replace("e-0", "e-")


def _table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
