"""Counting what code did, from PyTorch's profiler, which also sees inside custom operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile

# PyTorch 2.11 warns that the events of several cycles are not kept, even where there is one.
profile_cpu = partial(profile, activities=[ProfilerActivity.CPU], acc_events=True)

OPERANDS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products."""
    with profile_cpu(record_shapes=True) as profiler:
        run()
    flops = 0
    for event in profiler.events():
        if event.name in OPERANDS:
            (rows, inner), (_, columns) = (event.input_shapes[i] for i in OPERANDS[event.name])
            flops += 2 * rows * inner * columns
    return flops


def peak_bytes_of(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while running."""
    with profile_cpu(profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(nbytes for _, nbytes in sorted(changes)), default=0)
