"""Peak memory, time and error of one peer, measured in a process of its own."""

import ctypes
import gc
import multiprocessing
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import psutil
import torch
from inputs import InputError, load_batch
from peers import PEERS, Peer, why_missing
from reference import reference_file, save_references
from torch import Tensor

WARM_UP_TOKENS_PER_ROW = 8
MAX_REPEATS = {"cpu": 3, "cuda": 20}
# Timing goes on until this many seconds are spent: the whole demo should end in minutes on two
# cores, and calls of many seconds vary little.
TIMING_SECONDS = 6.0

_processes = multiprocessing.get_context("spawn")  # fork would inherit the parent's memory


Status = Literal["ok", "missing", "failed"]


@dataclass(frozen=True)
class Job:
    """One peer with one kind of head on one batch, over all token counts."""

    model: str
    peer: str
    head: str  # "frozen" or "trained"
    tokens: list[int]
    folder: Path  # where `batch.pt` and `reference-N.pt` lie
    device: str


@dataclass
class Measurement:
    """One row of the results. Bytes and seconds; errors are relative to the float64 run."""

    model: str
    tokens: int
    head: str
    peer: str
    status: Status
    reason: str = ""
    peak_extra_bytes: int | None = None
    forward_seconds: float | None = None
    seconds: float | None = None
    repeats: int | None = None
    loss_error: float | None = None
    hidden_grad_error: float | None = None
    weight_grad_error: float | None = None
    floor_ratio: float | None = None  # filled in when the floor of the whole run is known


def run(job: Job) -> Iterator[Measurement]:
    """Measure a job in a fresh process; yield one row for each token count as it comes."""
    left = list(job.tokens)
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_measure_job, args=(job, sender))
    process.start()
    sender.close()
    while left:
        try:
            row: Measurement = receiver.recv()
        except EOFError:
            break
        left.remove(row.tokens)
        yield row
    process.join()
    for tokens in left:
        reason = f"its process ended with exit code {process.exitcode}"
        yield _row(job, tokens, "failed", reason)


def run_references(folder: Path, tokens: list[int], device: str) -> None:
    """Compute the float64 runs in a fresh process."""
    process = _processes.Process(target=save_references, args=(folder, tokens, device))
    process.start()
    process.join()
    if process.exitcode:
        raise InputError(
            f"the float64 run ended with exit code {process.exitcode}; if memory ran out, "
            "choose fewer --tokens"
        )


def _measure_job(job: Job, sender: Connection) -> None:
    """Body of the measured process."""
    warnings.simplefilter("ignore")  # libraries' notices would tear the progress bar
    for tokens in job.tokens:
        try:
            row = _measure_point(job, tokens)
        except ImportError as error:
            row = _row(job, tokens, "missing", why_missing(error, PEERS[job.peer].install))
        except Exception as error:  # another project's error is a result to show
            row = _row(job, tokens, "failed", one_line(error))
        sender.send(row)


def _row(job: Job, tokens: int, status: Status, reason: str = "") -> Measurement:
    return Measurement(job.model, tokens, job.head, job.peer, status, reason)


def one_line(error: Exception) -> str:
    """An error's class and the beginning of its message."""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:200]


def _measure_point(job: Job, tokens: int) -> Measurement:
    peer, device = PEERS[job.peer], torch.device(job.device)
    hidden, weight, labels, shaping = load_batch(job.folder / "batch.pt", tokens, device)
    weight.requires_grad_(job.head == "trained")
    hidden.requires_grad_()

    # First a tiny batch: imports, thread pools, kernels and library workspaces, which a training
    # run pays for once, are then part of the baseline.
    few = slice(0, WARM_UP_TOKENS_PER_ROW)
    warm_up = hidden[:, few].detach().requires_grad_()
    torch.autograd.backward(peer.loss(warm_up, weight, labels[:, few], shaping))
    del warm_up

    def forward() -> Tensor:
        hidden.grad = weight.grad = None
        return peer.loss(hidden, weight, labels, shaping)

    hidden.grad = weight.grad = None
    losses: list[Tensor] = []
    peak = peak_growth(lambda: _forward_backward(forward, losses), device)
    row = _row(job, tokens, "ok")
    # Memory is counted in whole pages, so that a very small batch could come out below zero.
    row.peak_extra_bytes = max(peak - _bytes(hidden.grad) - _bytes(weight.grad), 0)
    _add_errors(row, peer, losses[0], hidden.grad, weight.grad, job.folder)

    times: list[tuple[float, float]] = []
    while (
        len(times) < MAX_REPEATS[device.type] and sum(total for _, total in times) < TIMING_SECONDS
    ):
        times.append(_timed(forward, device))
    row.forward_seconds = statistics.median(forward_time for forward_time, _ in times)
    row.seconds = statistics.median(total for _, total in times)
    row.repeats = len(times)
    return row


def _forward_backward(forward: Callable[[], Tensor], losses: list[Tensor]) -> None:
    loss = forward()
    torch.autograd.backward(loss)
    losses.append(loss.detach())


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


def peak_growth(call: Callable[[], None], device: torch.device) -> int:
    """Run `call` and return by how many bytes memory in use rose above its start at the highest.

    On CUDA: what the allocator handed out. On the CPU: resident memory of this process, whose
    high-water mark Linux keeps and lets us reset; elsewhere it is sampled every millisecond.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start: int = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak: int = torch.cuda.max_memory_allocated()
        return peak - start
    _trim_heap()
    start = _resident_bytes()
    if _reset_high_water_mark():
        call()
        return max(_high_water_mark() - start, 0)
    return _sampled_peak(call) - start


def _trim_heap() -> None:
    """Give freed memory back to the system.

    Without this, glibc keeps freed blocks of up to 32 MB resident; they would be counted in the
    baseline, and the measured call would reuse them and look lighter than it is.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")


def _sampled_peak(call: Callable[[], None]) -> int:
    done = threading.Event()
    samples = [_resident_bytes()]

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(_resident_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return max(samples)


def _timed(forward: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Return the seconds of one forward, and of that forward and its backward together."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
        events[0].record()
        loss = forward()
        events[1].record()
        torch.autograd.backward(loss)
        events[2].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3, events[0].elapsed_time(events[2]) / 1e3
    start = time.perf_counter()
    loss = forward()
    middle = time.perf_counter()
    torch.autograd.backward(loss)
    return middle - start, time.perf_counter() - start


def _add_errors(
    row: Measurement,
    peer: Peer,
    loss: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    folder: Path,
) -> None:
    saved = torch.load(reference_file(folder, row.tokens), map_location=loss.device)
    expected = saved[1.0 if peer.takes_shaping else 0.0]
    row.loss_error = abs(loss.item() - expected["loss"]) / abs(expected["loss"])
    row.hidden_grad_error = relative_error(hidden_grad, expected["hidden_grad"])
    row.weight_grad_error = relative_error(weight_grad, expected["weight_grad"])


def relative_error(got: Tensor | None, expected: Tensor) -> float | None:
    """Norm of the difference over the norm of what is expected; None of nothing."""
    if got is None:
        return None
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))
