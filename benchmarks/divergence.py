"""Peak memory, time and error of a divergence between two heads: fastpref and its peers."""

import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from divergence_peers import BASELINE, HEADS, KINDS, PEERS, Head, Kind, Side, from_logits, wider
from inputs import ROWS, SHIPPED_PAIRS, InputError, real_batch
from measure import peak_growth, relative_error
from memory import RESULTS, check_output, parse_tokens
from peers import why_missing
from report import MEGABYTE, describe_run, write_json
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

DEFAULT_TOKENS = {"cpu": "1000,3000", "cuda": "4096,16384"}
MOST_REPEATS = {"cpu": 3, "cuda": 20}
TIMING_SECONDS = 10.0  # after which no further call is timed
WARM_UP_TOKENS = 32
REFERENCE_ROWS = 100  # float64 logits of so many tokens at once
STYLES = {
    BASELINE: "#000000",
    "TRL ChunkedDivergence": "#009E73",
    "Liger fused JSD": "#CC79A7",
    "fastpref": "#0072B2",
    "fastpref, scratch_bytes=0": "#56B4E9",
}

_processes = multiprocessing.get_context("spawn")  # fork would inherit the parent's memory
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Job:
    """One peer at one point, for a process of its own."""

    peer: str
    kind: Kind
    head: Head
    tokens: int
    dtype: str
    folder: Path
    device: str


@dataclass
class Row:
    """One row of the results. Bytes and seconds; errors are relative to a float64 run."""

    dtype: str
    tokens: int
    head: Head
    kind: Kind
    peer: str
    status: Literal["ok", "missing", "failed"]
    reason: str = ""
    peak_extra_bytes: int | None = None
    seconds: float | None = None
    repeats: int | None = None
    value_error: float | None = None
    hidden_grad_error: float | None = None
    weight_grad_error: float | None = None


@app.command()
def main(
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Tokens, one measurement each. "
            f"By default {DEFAULT_TOKENS['cpu']} on a CPU, {DEFAULT_TOKENS['cuda']} on a GPU.",
        ),
    ] = None,
    dtypes: Annotated[
        str,
        typer.Option(
            metavar="DTYPE,...",
            help="float32, bfloat16 or both; bfloat16 at the fewest tokens only.",
        ),
    ] = "float32,bfloat16",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Where the results go; the plot goes beside them as .png. "
            "By default benchmarks/results/divergence-cpu.json or divergence-cuda.json.",
        ),
    ] = None,
) -> None:
    """Measure peak memory, time and error of the divergence between a student and a teacher.

    The student is SmolLM2 at its own head, on response tokens of the shipped pairs. The teacher's
    head is twice as wide: the student's numbers, and as many random ones. Compares fastpref with
    full logits, TRL's chunked divergence and Liger's fused linear JSD, each in a process of its
    own, with a frozen and with a trained head of the student. Prints a table, writes JSON and a
    plot.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    try:
        counts = parse_tokens(tokens or DEFAULT_TOKENS[device])
        names = _parse_dtypes(dtypes)
        json_path = check_output(output or RESULTS / f"divergence-{device}.json")
        rows = measure_all(counts, names, device, console)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    write_json(json_path, describe_run() | {"device": device}, rows)
    plot(json_path, json_path.with_suffix(".png"))
    console.print(table(rows))
    for note in {f"{row.peer} {row.status}: {row.reason}" for row in rows if row.reason}:
        console.print(note, style="red", markup=False)
    console.print("Peak extra memory: beyond inputs and returned gradients; 1 MB = 1e6 bytes.")
    console.print(f"Wrote {json_path} and {json_path.with_suffix('.png')}", soft_wrap=True)


def _parse_dtypes(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= {"float32", "bfloat16"}:
        raise InputError(f"--dtypes: expected float32, bfloat16 or both, got {text!r}")
    return names


def measure_all(counts: list[int], dtypes: list[str], device: str, console: Console) -> list[Row]:
    """Measure every peer at every point."""
    rows = []
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="fastpref-") as name,
        Progress(*columns, "{task.description}", console=console, transient=True) as progress,
    ):
        folder = Path(name)
        task = progress.add_task("hidden states")
        save_inputs(folder, counts[-1])
        points = [
            (dtype, count, head, kind)
            for dtype in dtypes
            for count in (counts if dtype == "float32" else counts[:1])
            for head in HEADS
            for kind in KINDS
        ]
        references = {(dtype, count, kind) for dtype, count, _, kind in points}
        jobs = [
            Job(peer.name, kind, head, count, dtype, folder, device)
            for dtype, count, head, kind in points
            for peer in PEERS.values()
            if head in peer.heads
        ]
        progress.update(task, total=len(references) + len(jobs))
        for dtype, count, kind in sorted(references):
            progress.update(task, description=f"float64, {kind}, {count} tokens")
            _in_process(save_reference, folder, dtype, count, kind, device)
            progress.advance(task)
        for job in jobs:
            where = f"{job.peer}, {job.kind}, {job.head} head, {job.tokens} tokens"
            progress.update(task, description=where)
            rows.append(run(job))
            progress.advance(task)
    return rows


def save_inputs(folder: Path, tokens: int) -> None:
    """Save both sides (N, H) and the labels (N,) in float32."""
    batch = real_batch(None, SHIPPED_PAIRS, tokens // ROWS)
    hidden, weight = batch.hidden[:, :-1].flatten(0, 1), batch.weight
    teacher = wider(Side(hidden, weight), torch.Generator().manual_seed(0))
    labels = batch.labels.flatten()
    torch.save(
        {"student": [hidden, weight], "teacher": [*teacher], "labels": labels}, _file(folder)
    )


def _file(folder: Path) -> Path:
    return folder / "inputs.pt"


def load_inputs(folder: Path, dtype: str, tokens: int, device: str) -> tuple[Side, Side, Tensor]:
    """Student, teacher and labels of the first tokens."""
    saved = torch.load(_file(folder), map_location=device)
    sides = []
    for side in ("student", "teacher"):
        hidden, weight = (one.to(getattr(torch, dtype)) for one in saved[side])
        sides.append(Side(hidden[:tokens].clone(), weight))
    return sides[0], sides[1], saved["labels"][:tokens]


def save_reference(folder: Path, dtype: str, tokens: int, kind: Kind, device: str) -> None:
    """Value and gradients in float64, of full logits of some tokens at a time."""
    student, teacher, _ = load_inputs(folder, dtype, tokens, device)
    weight = student.weight.double().requires_grad_()
    theirs = teacher.weight.double().T
    value, hidden_grads = 0.0, []
    for start in range(0, tokens, REFERENCE_ROWS):
        hidden = student.hidden[start : start + REFERENCE_ROWS].double().requires_grad_()
        logits = teacher.hidden[start : start + REFERENCE_ROWS].double() @ theirs
        share = from_logits(hidden @ weight.T, logits, kind) * (len(hidden) / tokens)
        torch.autograd.backward(share)
        assert hidden.grad is not None
        hidden_grads.append(hidden.grad)
        value += share.item()
    assert weight.grad is not None
    torch.save(
        # Stored as float32 to save disk: its rounding, 3e-8, is far below every error measured.
        {
            "value": value,
            "hidden_grad": torch.cat(hidden_grads).float(),
            "weight_grad": weight.grad.float(),
        },
        _reference(folder, dtype, tokens, kind),
    )


def _reference(folder: Path, dtype: str, tokens: int, kind: Kind) -> Path:
    return folder / f"{dtype}-{tokens}-{kind}.pt"


def _in_process(function: Any, *arguments: Any) -> None:
    process = _processes.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise InputError(f"the float64 run ended with exit code {process.exitcode}")


def run(job: Job) -> Row:
    """Measure a job in a fresh process."""
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_measure_job, args=(job, sender))
    process.start()
    sender.close()
    try:
        row: Row = receiver.recv()
    except EOFError:
        process.join()
        row = _row(job, "failed", f"its process ended with exit code {process.exitcode}")
    process.join()
    return row


def _row(job: Job, status: Literal["ok", "missing", "failed"], reason: str = "") -> Row:
    return Row(job.dtype, job.tokens, job.head, job.kind, job.peer, status, reason)


def _measure_job(job: Job, sender: Connection) -> None:
    warnings.simplefilter("ignore")  # libraries' notices would tear the progress bar
    try:
        row = _measure(job)
    except ImportError as error:
        row = _row(job, "missing", why_missing(error, PEERS[job.peer].install))
    except Exception as error:  # another project's error is a result to show
        row = _row(job, "failed", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    sender.send(row)


def _measure(job: Job) -> Row:
    student, teacher, labels = load_inputs(job.folder, job.dtype, job.tokens, job.device)
    student.weight.requires_grad_(job.head == "trained")
    student.hidden.requires_grad_()
    call = PEERS[job.peer].call

    # Imports, thread pools and kernels are then part of the baseline.
    few = slice(0, WARM_UP_TOKENS)
    warm_up = student._replace(hidden=student.hidden[few].detach().requires_grad_())
    theirs = teacher._replace(hidden=teacher.hidden[few])
    torch.autograd.backward(call(warm_up, theirs, labels[few], job.kind))
    del warm_up, theirs

    values = []

    def step() -> None:
        student.hidden.grad = student.weight.grad = None
        value = call(student, teacher, labels, job.kind)
        torch.autograd.backward(value)
        values.append(value.detach())

    student.hidden.grad = student.weight.grad = None
    device = torch.device(job.device)
    peak = peak_growth(step, device)
    gradients: list[Tensor | None] = [student.hidden.grad, student.weight.grad]
    returned = sum(one.nbytes for one in gradients if one is not None)
    row = _row(job, "ok")
    row.peak_extra_bytes = max(peak - returned, 0)
    saved = torch.load(_reference(job.folder, job.dtype, job.tokens, job.kind), map_location=device)
    row.value_error = abs(values[0].item() - saved["value"]) / abs(saved["value"])
    row.hidden_grad_error = relative_error(gradients[0], saved["hidden_grad"])
    row.weight_grad_error = relative_error(gradients[1], saved["weight_grad"])
    del gradients, saved

    times: list[float] = []
    while len(times) < MOST_REPEATS[device.type] and sum(times) < TIMING_SECONDS:
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - start)
    row.seconds, row.repeats = statistics.median(times), len(times)
    return row


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _sections(rows: list[Row]) -> Iterator[tuple[tuple[str, int, Head, Kind], list[Row]]]:
    for key, section in groupby(rows, lambda row: (row.dtype, row.tokens, row.head, row.kind)):
        yield key, list(section)


def table(rows: list[Row]) -> Table:
    """A section for each dtype, number of tokens, head and kind."""
    result = Table(
        title="Divergence between two heads, one forward and backward",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("peer", no_wrap=True)
    for name in ("extra\npeak MB", "vs full\nlogits", "time\ns", "vs full\nlogits"):
        result.add_column(name, justify="right", no_wrap=True)
    for name in ("error\nvalue", "error\nhidden", "error\nweight"):
        result.add_column(name, justify="right", no_wrap=True)
    for (dtype, tokens, head, kind), section in _sections(rows):
        result.add_row(f"[bold]{kind}, {head} head, {tokens} tokens, {dtype}")
        full = next((row for row in section if row.peer == BASELINE and row.status == "ok"), None)
        for row in section:
            result.add_row(f"  {row.peer}", *_cells(row, full))
        result.add_section()
    return result


def _cells(row: Row, full: Row | None) -> list[str]:
    if row.status != "ok":
        return [f"[red]{row.status}"]
    peak, seconds = cast(int, row.peak_extra_bytes), cast(float, row.seconds)
    of_full = [
        f"{value / cast(float, whole):.2f}x" if full is not None else "–"
        for value, whole in (
            (peak, full and full.peak_extra_bytes),
            (seconds, full and full.seconds),
        )
    ]
    errors = (row.value_error, row.hidden_grad_error, row.weight_grad_error)
    return [
        f"{peak / MEGABYTE:.0f}", of_full[0], f"{seconds:.2f}", of_full[1],
        *("–" if error is None else f"{error:.0e}" for error in errors),
    ]  # fmt: skip


def plot(json_path: Path, image_path: Path) -> None:
    """Draw time and peak extra memory as bars, from a JSON report."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    report = json.loads(json_path.read_text())
    rows = [row for row in report["rows"] if row["dtype"] == "float32"] or report["rows"]
    most = max(row["tokens"] for row in rows)
    rows = [row for row in rows if row["tokens"] == most and row["status"] == "ok"]
    figure, axes = pyplot.subplots(
        2, 2, figsize=(9, 6.6), sharex=True, sharey="row", layout="constrained"
    )
    for column, head in enumerate(HEADS):
        for place, (peer, color) in enumerate(STYLES.items()):
            chosen = [row for row in rows if row["peer"] == peer and row["head"] == head]
            x = [KINDS.index(row["kind"]) + (place - 2) * 0.16 for row in chosen]
            memory = [row["peak_extra_bytes"] / MEGABYTE for row in chosen]
            axes[0, column].bar(x, memory, 0.14, color=color, label=peer)
            axes[1, column].bar(x, [row["seconds"] for row in chosen], 0.14, color=color)
        axes[0, column].set_title(f"{head} head", fontsize=11)
        axes[0, column].set_yscale("log")
        axes[0, column].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes[0, column].yaxis.set_major_formatter(ticker.ScalarFormatter())
        axes[0, column].yaxis.set_minor_locator(ticker.NullLocator())
        axes[1, column].set_xticks(range(len(KINDS)), [kind.replace("_", " ") for kind in KINDS])
    axes[0, 0].set_ylabel("peak extra memory, MB (log scale)")
    axes[1, 0].set_ylabel("forward + backward, s")
    for axis in axes.flat:
        axis.grid(alpha=0.25, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
    figure.suptitle(f"Divergence between two heads, {most} tokens, float32\n{where}", fontsize=12)
    lines, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(image_path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    app()
