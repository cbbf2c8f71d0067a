"""Rounding errors of every primitive against float64: fastpref and its peers."""

import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import typer
from divergence_peers import Side, wider
from error_primitives import FASTPREF, FULL, PRIMITIVES, Call, Inputs, Peer, Primitive
from error_report import ERRORS, ROUNDED, markdown, summary
from inputs import ROWS, SHIPPED_PAIRS, SMOLLM2, InputError, real_batch
from measure import one_line, relative_error
from memory import RESULTS, check_output
from peers import why_missing
from report import describe_run, write_json
from rich.console import Console
from rich.progress import track
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
SPREADS = (1, 5, 20)  # standard deviations of random logits
TOKENS, HIDDEN_SIZE, VOCABULARY = 256, 128, 2048  # of random inputs
REAL_TOKENS = 64
KNOWN = 32  # tokens of the teacher that top-k functions are given

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass
class Row:
    """Errors of one way to compute a primitive, relative to the norm of the float64 result.

    None where it has no such result: a mean over tokens has no values, a frozen head no gradient.
    """

    primitive: str
    by: str
    status: Literal["ok", "missing", "failed", "needs a GPU"] = "ok"
    reason: str = ""
    value: float | None = None
    hidden: float | None = None
    head: float | None = None
    inputs: str = ""
    dtype: str = ""


class Found(NamedTuple):
    """What a call gives, and the gradients of the mean over tokens."""

    values: dict[str, Tensor]  # (N,) each; of a peer that has the mean only, a scalar
    hidden: Tensor | None = None  # (N, H)
    head: Tensor | None = None  # (V, H)


@app.command()
def main(
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Where the results go; all tables go beside them as .md. "
            "By default benchmarks/results/errors-cpu.json or errors-cuda.json.",
        ),
    ] = None,
) -> None:
    """Measure the rounding errors of every primitive, in float32, bfloat16 and float16.

    On random logits of standard deviation 1, 5 and 20, and on SmolLM2's head with response tokens
    of the shipped pairs. Beside fastpref: full logits in PyTorch, and the log-probabilities and
    divergences of other libraries. Every error is that of all tokens' values, or of the gradient
    of their mean, against float64 with full logits of the same inputs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    warnings.simplefilter("ignore")  # libraries' notices would tear the progress bar
    start = time.perf_counter()
    try:
        path = check_output(output or RESULTS / f"errors-{device}.json")
        rows = []
        for name, inputs in all_inputs():
            # On a CPU, PyTorch's products in float16 of so wide a head take minutes.
            dtypes = DTYPES[:2] if name == SMOLLM2 and device == "cpu" else DTYPES
            jobs = [(dtype, primitive) for dtype in dtypes for primitive in PRIMITIVES]
            for dtype, primitive in track(jobs, name, console=console, transient=True):
                rows += measure(primitive, name, dtype, inputs.to(torch.float64, device))
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    report = describe_run() | {
        "device": device,
        "seconds": round(time.perf_counter() - start),
        "cpu_seconds": round(time.process_time()),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 1),
    }
    write_json(path, report, rows)
    path.with_suffix(".md").write_text(markdown(path), "utf-8")
    console.print(summary(path), markup=False, soft_wrap=True)
    console.print(f"Wrote {path} and {path.with_suffix('.md')}", soft_wrap=True)


def all_inputs() -> Iterator[tuple[str, Inputs]]:
    """Every batch with its name, in float64."""
    for spread in SPREADS:
        yield f"std {spread}", random_inputs(spread, TOKENS, HIDDEN_SIZE, VOCABULARY)
    batch = real_batch(None, SHIPPED_PAIRS, REAL_TOKENS // ROWS)
    student = Side(batch.hidden[:, :-1].flatten(0, 1), batch.weight)
    yield SMOLLM2, _with_teacher(student, batch.labels.flatten())


def random_inputs(spread: float, tokens: int, hidden_size: int, vocabulary: int) -> Inputs:
    """Random states and heads; labels are drawn from the student's distribution."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator) * spread / hidden_size**0.5
    probabilities = (hidden @ weight.T).softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return _with_teacher(Side(hidden, weight), labels)


def _with_teacher(student: Side, labels: Tensor) -> Inputs:
    generator = torch.Generator().manual_seed(1)  # another than the student's
    teacher, reference = wider(student, generator), wider(student, generator)
    logs = (teacher.hidden @ teacher.weight.T).log_softmax(-1)
    logps, ids = logs.topk(KNOWN)
    return Inputs(student, teacher, reference, labels, ids, logps).to(torch.float64)


def measure(primitive: Primitive, name: str, dtype: str, inputs: Inputs) -> list[Row]:
    """Every way to compute a primitive from the same inputs, rounded to a dtype."""
    given = inputs.to(getattr(torch, dtype))
    trains = primitive.gradients == "both"
    exact = run(primitive, primitive.formula, given.to(torch.float64), trains=trains)
    rows = rows_of(primitive, ROUNDED, rounded(exact, given.student.hidden.dtype), exact)
    # A frozen head and one that trains are different algorithms in fastpref: the larger error.
    rows += larger(
        *(
            rows_of(
                primitive, FASTPREF, run(primitive, primitive.fastpref, given, trains=one), exact
            )
            for one in sorted({False, trains})
        )
    )
    peers = {FULL: Peer(primitive.formula)} | primitive.peers
    for by, peer in peers.items():
        if peer.needs_cuda and not given.labels.is_cuda:
            rows.append(Row(primitive.name, by, "needs a GPU"))
            continue
        try:
            found = run(primitive, peer.call, given, trains=trains)
        except ImportError as error:
            rows.append(Row(primitive.name, by, "missing", why_missing(error, peer.install)))
        except Exception as error:  # another project's error is a result to show
            rows.append(Row(primitive.name, by, "failed", one_line(error)))
        else:
            rows += rows_of(primitive, by, found, exact)
    for row in rows:
        row.inputs, row.dtype = name, dtype
    return rows


def run(primitive: Primitive, call: Call, inputs: Inputs, *, trains: bool) -> Found:
    """Call, and take the gradients that there are; with ``trains`` that of the head, too."""
    hidden, head = (one.detach().clone() for one in inputs.student)
    hidden.requires_grad_(primitive.gradients != "none")
    head.requires_grad_(trains)
    found = call(inputs._replace(student=Side(hidden, head)))
    values = found if isinstance(found, dict) else {primitive.name: found}
    if hidden.requires_grad:
        torch.autograd.backward(values[primitive.name].mean())
    return Found({key: one.detach() for key, one in values.items()}, hidden.grad, head.grad)


def rounded(exact: Found, dtype: torch.dtype) -> Found:
    """What no function can beat: the float64 result in the dtype that functions return."""
    values = {key: one.float() for key, one in exact.values.items()}
    return Found(values, *(None if one is None else one.to(dtype) for one in exact[1:]))


def rows_of(primitive: Primitive, by: str, found: Found, exact: Found) -> list[Row]:
    """A row for each of a primitive's values that was found."""
    hidden, head = (
        None if one is None or expected is None else relative_error(one, expected)
        for one, expected in zip(found[1:], exact[1:], strict=True)
    )
    return [
        Row(key, by, value=_value_error(found.values[key], expected), hidden=hidden, head=head)
        for key, expected in exact.values.items()
        if key in found.values
    ]


def _value_error(found: Tensor, expected: Tensor) -> float | None:
    """None of a mean."""
    return relative_error(found, expected) if found.shape == expected.shape else None


def larger(one: list[Row], *others: list[Row]) -> list[Row]:
    """Rows with the largest errors of several runs of the same."""

    def largest(rows: tuple[Row, ...], name: str) -> float | None:
        return max(
            (error for row in rows if (error := getattr(row, name)) is not None), default=None
        )

    return [
        replace(rows[0], **{name: largest(rows, name) for name in ERRORS})
        for rows in zip(one, *others, strict=True)
    ]


if __name__ == "__main__":
    app()
