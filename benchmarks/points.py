"""Measure contenders at points (a head, a number of tokens, a mode), in processes of their own."""

import functools
import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

import torch
from check import Errors, Outcome, errors, expected, outcome, scalar
from contenders import CONTENDERS, Contender, Gives, Mode
from floor import Floor, measure_copy, measure_floor
from head_shapes import HeadShape, InputSet, make_inputs
from measure import peak_growth
from peers import why_missing
from timing import Clock, input_sets, repeat, timed

# On so many tokens a contender is checked, against logits of all of them in wider numbers.
CHECK_TOKENS = {"cuda": 512, "cpu": 128}
CHECK_SEED = 1_000
# A point that takes longer, with its compilation and tuning, is given up.
POINT_LIMIT = {"cuda": 60.0, "cpu": 90.0}
START_LIMIT = 60.0  # for imports, beside the first point

Status = Literal["ok", "missing", "wrong", "out of memory", "failed", "skipped"]

_processes = multiprocessing.get_context("spawn")  # fork would inherit the parent's memory


class Point(NamedTuple):
    """Where a contender is measured."""

    shape: HeadShape
    tokens: int
    mode: Mode
    slow: float = math.inf  # seconds; of who takes longer, one call is enough


@dataclass(frozen=True)
class Job:
    """One contender at many points."""

    contender: str  # its key
    points: list[Point]
    device: str
    seconds: float  # for the timing of a point
    deadline: float  # in time.time(): what has not begun by then is skipped


@dataclass
class Row:
    """One row of the results. Bytes and seconds; errors are relative to a wider run."""

    shape: str
    tokens: int
    mode: Mode
    contender: str
    status: Status
    reason: str = ""
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    seconds: float | None = None
    spread: float | None = None  # (slowest - fastest) / median
    repeats: int | None = None
    peak_extra_bytes: int | None = None
    value_error: float | None = None
    hidden_grad_error: float | None = None
    weight_grad_error: float | None = None
    # Filled in when the floor of the whole run is known.
    floor_ratio: float | None = None
    useful_flops_per_second: float | None = None


def run(job: Job) -> Iterator[Row]:
    """Yield a row for each point; what kills or hangs a process costs one point only."""
    left = list(job.points)
    if CONTENDERS[job.contender].needs_cuda and job.device != "cuda":
        yield from (_row(job, point, "missing", "measured on CUDA GPUs only") for point in left)
        return
    while left:
        receiver, sender = _processes.Pipe(duplex=False)
        process = _processes.Process(target=_measure_job, args=(replace(job, points=left), sender))
        process.start()
        sender.close()
        limit = POINT_LIMIT[job.device] + START_LIMIT
        reason, before = "", len(left)
        while left and not reason:
            try:
                if not receiver.poll(limit):
                    reason = f"given up after {limit:.0f} s"
                    continue
                row: Row = receiver.recv()
            except EOFError:
                break
            left = left[1:]
            limit = POINT_LIMIT[job.device]
            yield row
        if reason:
            process.kill()
        process.join()
        if left and (reason or process.exitcode or len(left) == before):
            reason = reason or f"its process ended with exit code {process.exitcode}"
            yield _row(job, left[0], "failed", reason)
            left = left[1:]


def run_floors(
    points: list[tuple[HeadShape, int]], device: str, seconds: float
) -> tuple[list[Floor], float]:
    """Measure the floors and the rate of copies in a fresh process."""
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(
        target=_measure_floors, args=(points, device, seconds, sender), daemon=True
    )
    process.start()
    sender.close()
    try:
        result: tuple[list[Floor], float] = receiver.recv()
    except EOFError:
        raise RuntimeError("the matrix products of the floor could not be measured") from None
    process.join()
    return result


def _measure_floors(
    points: list[tuple[HeadShape, int]], device: str, seconds: float, sender: Connection
) -> None:
    floors = [measure_floor(shape, tokens, device, seconds) for shape, tokens in points]
    sender.send((floors, measure_copy(device, seconds)))


def _measure_job(job: Job, sender: Connection) -> None:
    """Body of the measured process."""
    warnings.simplefilter("ignore")  # libraries' notices would tear the progress bar
    for point in job.points:
        if time.time() > job.deadline:
            sender.send(_row(job, point, "skipped", "time was up"))
            continue
        sender.send(_try_point(job, point))
        if job.device == "cuda" and not _device_works():
            os._exit(0)  # the next process goes on with the next point


def _try_point(job: Job, point: Point) -> Row:
    try:
        return _measure_point(job, point)
    except ImportError as error:
        return _row(job, point, "missing", why_missing(error, CONTENDERS[job.contender].install))
    except torch.OutOfMemoryError:
        return _row(job, point, "out of memory", "")
    except Exception as error:  # another project's error is a result to show
        if "can't allocate memory" in str(error):
            return _row(job, point, "out of memory", "")
        return _row(job, point, "failed", _one_line(error))
    finally:
        if job.device == "cuda" and _device_works():
            torch.cuda.empty_cache()


def _device_works() -> bool:
    """Whether an illegal access has not taken the CUDA context of this process with it."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _one_line(error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:200]


def _row(job: Job, point: Point, status: Status, reason: str = "") -> Row:
    return Row(point.shape.key, point.tokens, point.mode, job.contender, status, reason)


def _measure_point(job: Job, point: Point) -> Row:
    contender = CONTENDERS[job.contender]
    found = _check(job.contender, point.shape, point.mode, job.device)
    sets = _inputs(point.shape, point.tokens, job.device)
    row = _row(job, point, "ok")
    row.value_error, row.hidden_grad_error = found.value, found.hidden_grad
    row.weight_grad_error = found.weight_grad
    if wrong := found.verdict(sets[0].hidden.dtype):
        row.status, row.reason = "wrong", wrong
        return row
    leaves = [_leaves(inputs, point.mode) for inputs in sets]

    def call(number: int, clock: Clock) -> None:
        _call(contender, leaves[number % len(leaves)], point.mode, clock)

    first = _measure_memory(row, contender, call, leaves[0], job.device)
    if sum(first) > point.slow:
        _add_times(row, [first])
    else:
        drop = functools.partial(_drop_gradients, leaves)
        _add_times(row, repeat(call, job.device, job.seconds, between=drop))
    return row


@functools.lru_cache(maxsize=8)
def _check(key: str, shape: HeadShape, mode: Mode, device: str) -> Errors:
    """Errors of a contender; the same for every number of tokens, so computed once."""
    contender = CONTENDERS[key]
    inputs = make_inputs(shape, CHECK_TOKENS[device], CHECK_SEED, device)
    wanted = _expected(shape, contender.gives, device)
    return errors(outcome(contender, inputs, mode), wanted)


@functools.lru_cache(maxsize=1)
def _expected(shape: HeadShape, gives: Gives, device: str) -> Outcome:
    return expected(make_inputs(shape, CHECK_TOKENS[device], CHECK_SEED, device), gives)


@functools.lru_cache(maxsize=1)
def _inputs(shape: HeadShape, tokens: int, device: str) -> list[InputSet]:
    """Sets of inputs that together exceed the last-level cache."""
    first = make_inputs(shape, tokens, 0, device)
    number = input_sets(first.nbytes(), device)
    return [first] + [make_inputs(shape, tokens, seed, device) for seed in range(1, number)]


def _leaves(inputs: InputSet, mode: Mode) -> InputSet:
    return inputs._replace(
        hidden=inputs.hidden.detach().requires_grad_(mode != "no-grad"),
        weight=inputs.weight.detach().requires_grad_(mode == "trained"),
    )


def _drop_gradients(leaves: list[InputSet]) -> None:
    for leaf in leaves:
        leaf.hidden.grad = leaf.weight.grad = None


def _call(contender: Contender, leaf: InputSet, mode: Mode, clock: Clock) -> None:
    """Forward and, after a tick of the clock, backward."""
    hidden, weight, labels, coefficients = leaf
    if mode == "no-grad":
        with torch.no_grad():
            contender.call(hidden, weight, labels)
        return
    value = scalar(contender.call(hidden, weight, labels), coefficients)
    clock()
    torch.autograd.backward(value)


def _measure_memory(
    row: Row,
    contender: Contender,
    call: Callable[[int, Clock], None],
    leaf: InputSet,
    device: str,
) -> list[float]:
    """Peak memory of one call beyond its inputs and its gradients; return the call's times.

    It warms up the timing of others, too.
    """
    if contender.compiles or device == "cuda":
        call(0, lambda: None)  # compilers and tuners take memory, too
        _drop_gradients([leaf])
    times: list[float] = []
    peak = peak_growth(
        lambda: times.extend(timed(functools.partial(call, 0), device)), torch.device(device)
    )
    gradients = (leaf.hidden.grad, leaf.weight.grad)
    # Memory is counted in whole pages, so that a very small call could come out below zero.
    row.peak_extra_bytes = max(peak - sum(g.nbytes for g in gradients if g is not None), 0)
    _drop_gradients([leaf])
    return times


def _add_times(row: Row, times: list[list[float]]) -> None:
    totals = [sum(parts) for parts in times]
    row.forward_seconds = statistics.median(parts[0] for parts in times)
    row.backward_seconds = (
        None if row.mode == "no-grad" else statistics.median(parts[1] for parts in times)
    )
    row.seconds = statistics.median(totals)
    row.spread = (max(totals) - min(totals)) / row.seconds
    row.repeats = len(totals)
