"""DDP: accumulated over two steps, with and without checkpointing; and what not to do."""

from __future__ import annotations

import contextlib

from one_process import (
    OneProcess,
    at_head,
    batch,
    gradients,
    mean_over_processes,
    processes,
    tiny_model,
)
from torch.nn.parallel import DistributedDataParallel

from fastpref.models.fused_head import add_fused_head


def accumulate(rank, world, *, checkpointing, unwrapped=False):
    """Loss and gradients of two steps, each of one pair a process."""
    model = tiny_model()
    add_fused_head(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model)
    loss = 0
    for step in range(2):
        data = batch().part(2 * rank + step, 2 * world)
        with wrapped.no_sync() if step == 0 else contextlib.nullcontext():
            called = model if unwrapped else wrapped
            part = called(input_ids=data.tokens, at_head=at_head(data))["loss"] / 2
            part.backward()
            loss = loss + part.detach()
    return mean_over_processes(loss), gradients(model)


rank, world = processes()
one = OneProcess(tiny_model(), batch())
for checkpointing in (False, True):
    found = accumulate(rank, world, checkpointing=checkpointing)
    one.check(*found)
# The failure that at_head is there for: nothing is reduced, and nobody says so.
_, unreduced = accumulate(rank, world, checkpointing=False, unwrapped=True)
assert all(
    (unreduced[name] - exact).norm() > 0.1 * exact.norm() for name, exact in one.exact.items()
)
