"""How long a GPU takes for what `counting_engine` counts: a model of few numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from counting_engine import HostRead, Kernel, Product, Step

# Products are computed in blocks of so many rows and columns, one on each multiprocessor at a time.
BLOCK = (128, 256)
RAMP = 6e-6  # seconds in which a product fills the device and drains it
LAUNCH = 2e-6  # seconds between a kernel and the next, where the queue is full
HOST_LAUNCH = 7e-6  # seconds of the host for a kernel
HOST_READ = 30e-6  # seconds in which the device waits until the host has read and queues again
ISSUED_PER_CLOCK = 128  # instructions of threads, by one multiprocessor at best
ISSUE_EFFICIENCY = 0.7  # of it where arithmetic waits for memory and for the exponential's unit
PROJECTION_RATE = 0.9  # of the rate of products, in the Triton kernel that projects and folds

MODEL = f"""Time of a product: the larger of FLOPs / (rate x wave efficiency) and bytes / bandwidth,
{1e6 * RAMP:.0f} us, and half of the bytes of an output that it adds to (read and written) /
bandwidth. Wave efficiency: of blocks of {BLOCK[0]} x {BLOCK[1]} numbers over all multiprocessors.
Other kernels: the larger of bytes / bandwidth and instructions / ({ISSUED_PER_CLOCK} x clock x
multiprocessors x {ISSUE_EFFICIENCY}). Bytes of a tile count as memory's, though some may still be
in L2. The projection kernel: FLOPs / ({PROJECTION_RATE} x rate), and the fold's instructions on
top. {1e6 * LAUNCH:.0f} us between kernels, {1e6 * HOST_READ:.0f} us for each number that the host
waits for; nothing runs faster than the host queues it, {1e6 * HOST_LAUNCH:.0f} us a kernel."""

# Instructions that a thread runs for each logit in the kernel of this name.
Instructions = Callable[[str], float]


@dataclass(frozen=True)
class Device:
    """What decides how fast a GPU is here."""

    name: str
    rate: float  # FLOP/s that torch.mm reaches on a large product of 16-bit operands
    rate_float32: float
    bandwidth: float  # bytes per second of a large copy, read and written
    processors: int
    clock: float  # Hz under load
    capability: int  # for which kernels are compiled: 90 is sm_90

    def rate_of(self, dtype: torch.dtype) -> float:
        """FLOP/s of products of such operands."""
        return self.rate if dtype.itemsize == 2 else self.rate_float32

    def issue_rate(self) -> float:
        """Instructions of threads per second."""
        return ISSUED_PER_CLOCK * self.clock * self.processors * ISSUE_EFFICIENCY


DEVICES = {
    device.name: device
    for device in (
        Device("h200", 790e12, 52e12, 4.3e12, 132, 1.7e9, 90),
        Device("h100", 750e12, 52e12, 3.0e12, 132, 1.7e9, 90),
        Device("a100", 265e12, 18e12, 1.75e12, 108, 1.4e9, 80),
    )
}


def wave_efficiency(rows: int, columns: int, processors: int) -> float:
    """Which part of the device's work is in the product, until its last block is done."""
    blocks = math.ceil(rows / BLOCK[0]) * math.ceil(columns / BLOCK[1])
    done = math.ceil(blocks / processors) * processors * BLOCK[0] * BLOCK[1]
    return rows * columns / done


def product_seconds(product: Product, device: Device) -> float:
    """Of one matrix product."""
    rate = device.rate if product.operand_bytes == 2 else device.rate_float32
    efficiency = wave_efficiency(product.rows, product.columns, device.processors)
    busy = max(product.flops / (rate * efficiency), product.nbytes / device.bandwidth)
    added = 2 * product.rows * product.columns * product.out_bytes if product.adds else 0
    return busy + RAMP + added / 2 / device.bandwidth


def kernel_seconds(kernel: Kernel, device: Device, instructions: Instructions) -> float:
    """Of one kernel that is no product of cuBLAS."""
    issued = kernel.logits * instructions(kernel.name) if kernel.logits else 0
    folding = issued / device.issue_rate()
    if kernel.flops:
        multiplying = kernel.flops / (PROJECTION_RATE * device.rate)
        return max(multiplying, kernel.nbytes / device.bandwidth) + folding + RAMP
    return max(kernel.nbytes / device.bandwidth, folding)


@dataclass
class Phase:
    """All steps of one kind."""

    name: str
    count: int = 0
    seconds: float = 0.0
    flops: int = 0
    nbytes: int = 0

    def add(self, seconds: float, flops: int = 0, nbytes: int = 0) -> None:
        """Count one step more."""
        self.count += 1
        self.seconds += seconds
        self.flops += flops
        self.nbytes += nbytes


def phases(
    forward: list[Step],
    backward: list[Step],
    hidden_size: int,
    device: Device,
    instructions: Instructions,
) -> list[Phase]:
    """The time of every phase, in the order in which they first begin."""
    found: dict[str, Phase] = {}

    def phase(name: str) -> Phase:
        return found.setdefault(name, Phase(name))

    gaps, host = Phase("between kernels"), Phase("host reads")
    for where, steps in (("forward", forward), ("backward", backward)):
        for step in steps:
            if isinstance(step, HostRead):
                host.add(HOST_READ)
            elif isinstance(step, Product):
                seconds = product_seconds(step, device)
                phase(f"{where}: {step.name}, product").add(seconds, step.flops, step.nbytes)
            else:
                seconds = kernel_seconds(step, device, instructions)
                name = f"{where}: {_kind(step, hidden_size)}"
                phase(name).add(seconds, step.flops, step.nbytes)
                gaps.add(LAUNCH)
    every = [*found.values(), gaps, host]
    queued = HOST_LAUNCH * (len(forward) + len(backward) - host.count)
    idle = queued - sum(one.seconds for one in every)
    if idle > 0:
        every.append(Phase("waiting for the host", 1, idle))
    return [one for one in every if one.count]


def _kind(kernel: Kernel, hidden_size: int) -> str:
    if kernel.logits:
        return f"{kernel.name} kernel"
    if len(kernel.shape) == 2 and kernel.shape[1] == hidden_size:
        return "passes over rows of H numbers"
    if len(kernel.shape) == 2 and kernel.shape[0] > 3 and kernel.shape[1] > 3:
        return "passes over kept tiles"
    return "passes over numbers of rows"
