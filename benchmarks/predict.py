"""How long fastpref should take on a GPU, phase by phase, from counts taken from its own code."""

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if find_spec("fastpref") is None:  # a bare checkout
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import typer
from contenders import PASSES, Mode
from counting_engine import count_steps
from device_model import DEVICES, MODEL, Device, Phase, phases
from floor import pass_flops
from head_shapes import SHAPES, HeadShape, parse_shapes
from inputs import InputError
from memory import RESULTS, parse_tokens
from rich import box
from rich.console import Console
from rich.table import Table

from fastpref.ops.linear_logps import AUTOMATIC_SCRATCH_BYTES

MEBIBYTE = 2**20
DTYPES = {str(one).removeprefix("torch."): one for one in (torch.bfloat16, torch.float16)} | {
    "float32": torch.float32
}
DEFAULT_SCRATCH = f"0,{AUTOMATIC_SCRATCH_BYTES // MEBIBYTE},2048"


class Case(NamedTuple):
    """What is predicted at once: one mode of one head and one number of tokens."""

    shape: HeadShape
    tokens: int
    mode: Mode
    scratch_bytes: int = 0

    def name(self) -> str:
        """The mode, for tables."""
        if self.mode == "trained":
            return f"trained, {self.scratch_bytes // MEBIBYTE} MiB"
        return "no gradient" if self.mode == "no-grad" else "frozen"

    def contender(self) -> str | None:
        """Its key in `speed.py`'s results."""
        if self.mode != "trained":
            return "fastpref"
        known = {0: "fastpref-least", AUTOMATIC_SCRATCH_BYTES: "fastpref"}
        return known.get(self.scratch_bytes)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    help="Predict how long fastpref takes on a GPU, phase by phase.\n\n"
    "Counts products, kernels, bytes and host reads by running the operators on tensors without "
    "data, and instructions per logit in the compiled kernels. No GPU is needed; Triton is.\n\n"
    + MODEL
)
def main(
    shapes: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help=f"Heads: {', '.join(SHAPES)}, or HIDDENxVOCABULARY such as 2048x32000.",
        ),
    ] = "llama-3.2-1b",
    tokens: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens in a batch.")] = "16384",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    scratch: Annotated[
        str,
        typer.Option(metavar="MiB,MiB,...", help="Scratch of a trained head."),
    ] = DEFAULT_SCRATCH,
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "h200",
    rate: Annotated[
        float | None, typer.Option(metavar="TFLOP/s", help="Instead of the device's own.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(metavar="TB/s", help="Likewise.")] = None,
    multiprocessors: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    clock: Annotated[float | None, typer.Option(metavar="GHz", help="Likewise.")] = None,
    results: Annotated[
        Path,
        typer.Option(
            metavar="FILE.json",
            help="Results of speed.py, whose times stand beside the predictions; if it is there.",
            show_default="benchmarks/results/speed-cuda.json",
        ),
    ] = RESULTS / "speed-cuda.json",
    summary: Annotated[bool, typer.Option("--summary", help="Leave the phases out.")] = False,
) -> None:
    """Print the tables; the text for users is in the decorator, which alone can compute it."""
    console = Console()
    try:
        heads, counts = parse_shapes(shapes), parse_tokens(tokens)
        budgets = parse_scratch(scratch)
        known = _choose("--device", device, DEVICES)
        numbers = _choose("--dtype", dtype, DTYPES)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    itself = describe(known, numbers, rate, bandwidth, multiprocessors, clock)
    measured = read_results(results)
    whole = summary_table(itself, dtype)
    for shape in heads:
        for count in counts:
            whole.add_row(f"[bold]{shape.name}, {count} tokens")
            for case in cases(shape, count, budgets):
                found = predict(case, itself, numbers)
                if not summary:
                    console.print(phase_table(case, found, itself, numbers))
                whole.add_row(*_summary_cells(case, found, itself, numbers, measured))
            whole.add_section()
    console.print(whole)
    console.print("MiB: of scratch. floor: 1, 2 and 3 products at the device's rate.")
    if not measured:
        console.print(f"Nothing measured: there is no {results.name}.", style="red")


def parse_scratch(text: str) -> list[int]:
    """Parse "0,512" in MiB into bytes."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--scratch: expected numbers of MiB such as 0,1024; got {text!r}")
    return list(dict.fromkeys(int(part) * MEBIBYTE for part in parts))


def _choose(option: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise InputError(f"{option}: expected one of {', '.join(known)}; got {name!r}")
    return known[name]


def describe(
    device: Device,
    dtype: torch.dtype,
    rate: float | None,
    bandwidth: float | None,
    multiprocessors: int | None,
    clock: float | None,
) -> Device:
    """A device with some of its numbers replaced; the rate is that of `dtype`."""
    if rate is not None:
        changed = {"rate" if dtype.itemsize == 2 else "rate_float32": rate * 1e12}
        device = replace(device, **changed)  # type: ignore[arg-type]  # all of them are floats
    if bandwidth is not None:
        device = replace(device, bandwidth=bandwidth * 1e12)
    if multiprocessors is not None:
        device = replace(device, processors=multiprocessors)
    return device if clock is None else replace(device, clock=clock * 1e9)


def cases(shape: HeadShape, tokens: int, budgets: list[int]) -> Iterator[Case]:
    """Every mode, and a trained head with each budget of scratch."""
    yield Case(shape, tokens, "no-grad")
    yield Case(shape, tokens, "frozen")
    for budget in budgets:
        yield Case(shape, tokens, "trained", budget)


def predict(case: Case, device: Device, dtype: torch.dtype) -> list[Phase]:
    """The time of every phase."""
    forward, backward = count_steps(
        case.shape, case.tokens, dtype, case.mode,
        scratch_bytes=case.scratch_bytes, processors=device.processors,
    )  # fmt: skip
    counted = functools.partial(instructions, dtype=dtype, capability=device.capability)
    return phases(forward, backward, case.shape.hidden_size, device, counted)


@functools.cache
def instructions(kernel: str, dtype: torch.dtype, capability: int) -> float:
    """Instructions that a thread runs for each logit, counted in the compiled kernel."""
    from instructions import fold_launch, gradient_launch, instructions_per_logit
    from triton.backends.compiler import GPUTarget

    from fastpref.ops.torch_tiles import LogitTransform

    # The projection kernel folds what it has in registers: without the fold's loads and stores, but
    # with masks; neither is counted apart.
    launch = gradient_launch if kernel == "gradient" else fold_launch
    target = GPUTarget("cuda", capability, 32)
    return instructions_per_logit(launch(dtype, LogitTransform()), target)


def floor_seconds(case: Case, device: Device, dtype: torch.dtype) -> float:
    """The products that nobody can do without."""
    return PASSES[case.mode] * pass_flops(case.shape, case.tokens) / device.rate_of(dtype)


def read_results(path: Path) -> dict[tuple[str, int, str, str], dict[str, Any]]:
    """Rows of `speed.py`'s results that were measured, or nothing where there is no file."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {
        (row["shape"], row["tokens"], row["mode"], row["contender"]): row
        for row in rows
        if row["status"] == "ok"
    }


def phase_table(case: Case, found: list[Phase], device: Device, dtype: torch.dtype) -> Table:
    """One row for each phase, and their sum."""
    total = sum(phase.seconds for phase in found)
    table = Table(
        title=f"{case.shape.name}, {case.tokens} tokens, {case.name()}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in ("times", "ms", "share", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in found:
        table.add_row(
            phase.name, str(phase.count), _milliseconds(phase.seconds),
            f"{phase.seconds / total:.1%}", _rate(phase),
        )  # fmt: skip
    floor = floor_seconds(case, device, dtype)
    table.add_section()
    table.add_row("sum", "", _milliseconds(total), "", f"{total / floor:.3f} x floor")
    products = "1 product" if PASSES[case.mode] == 1 else f"{PASSES[case.mode]} products"
    table.add_row(f"floor: {products}", "", _milliseconds(floor), "", "")
    return table


def summary_table(device: Device, dtype: str) -> Table:
    """The columns of the table at the end."""
    rate = device.rate_of(DTYPES[dtype])
    table = Table(
        title=f"{device.name}, {dtype}: {rate / 1e12:.0f} TFLOP/s, "
        f"{device.bandwidth / 1e12:.2f} TB/s, {device.processors} multiprocessors",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in ("floor\nms", "predicted\nms", "x\nfloor", "measured\nms", "x\nfloor"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _summary_cells(
    case: Case,
    found: list[Phase],
    device: Device,
    dtype: torch.dtype,
    measured: dict[tuple[str, int, str, str], dict[str, Any]],
) -> list[str]:
    total, floor = sum(phase.seconds for phase in found), floor_seconds(case, device, dtype)
    cells = [
        f"  {case.name()}",
        _milliseconds(floor), _milliseconds(total), f"{total / floor:.3f}",
    ]  # fmt: skip
    row = measured.get((case.shape.key, case.tokens, case.mode, case.contender() or ""))
    if row is None:
        return [*cells, "–", "–"]
    return [*cells, _milliseconds(row["seconds"]), f"{row['floor_ratio']:.3f}"]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _rate(phase: Phase) -> str:
    if phase.flops:
        return f"{phase.flops / phase.seconds / 1e12:.0f} TFLOP/s"
    return f"{phase.nbytes / phase.seconds / 1e12:.2f} TB/s" if phase.nbytes else ""


if __name__ == "__main__":
    app()
