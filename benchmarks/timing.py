"""Clocks: device events on a GPU, the host's on a CPU, over inputs that no cache holds."""

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

REPEATS = {"cuda": (3, 20), "cpu": (1, 5)}  # at least, at most
WARM_UPS = {"cuda": 2, "cpu": 0}  # beside the calls that check and that measure memory
CACHE_FACTOR = 2  # the inputs of consecutive calls exceed the last-level cache so many times
MOST_INPUT_SETS = 6

Clock = Callable[[], None]  # called between the parts of a call that are timed apart


def timed(call: Callable[[Clock], None], device: str) -> list[float]:
    """Seconds between the marks that `call` sets: its start, each call of the clock, its end."""
    if device == "cuda":
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            events[-1].record()

        mark()
        call(mark)
        mark()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]
    marks = [time.perf_counter()]
    call(lambda: marks.append(time.perf_counter()))
    marks.append(time.perf_counter())
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def repeat(
    call: Callable[[int, Clock], None],
    device: str,
    seconds: float,
    between: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Time `call(0, ...)`, `call(1, ...)`, ... until `seconds` are spent; one list for each.

    What `between` does before every call, such as freeing memory, is not timed.
    """
    fewest, most = REPEATS[device]
    number = count()

    def once() -> list[float]:
        between()
        return timed(lambda clock: call(next(number), clock), device)

    for _ in range(WARM_UPS[device]):
        once()
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < fewest or (len(times) < most and time.perf_counter() < end):
        times.append(once())
    return times


def input_sets(nbytes: int, device: str) -> int:
    """How many sets of inputs of `nbytes` to take turns with; two or more."""
    needed = -(-CACHE_FACTOR * cache_bytes(device) // nbytes)
    return max(2, min(needed, MOST_INPUT_SETS))


def cache_bytes(device: str) -> int:
    """Size of the last-level cache: L2 of a GPU, L3 of a CPU (32 MiB where it does not say)."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    try:
        return int((folders[-1] / "size").read_text().strip().removesuffix("K")) * 1024
    except (IndexError, OSError, ValueError):
        return 32 * 2**20
