"""DeepSpeed's ZeRO-3: the head is in memory while its module runs, and no longer."""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from one_process import OneProcess, at_head, batch, mean_over_processes, processes, tiny_model, tvkd

from fastpref.models.fused_head import add_fused_head

# Gloo does: DeepSpeed would compile collectives of its own, which takes a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
STEPS = 2
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": STEPS,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}

rank, world = processes()
one = OneProcess(tiny_model(), batch())
model = tiny_model()
add_fused_head(model)
model.gradient_checkpointing_enable({"use_reentrant": False})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
total = torch.zeros(())
for step in range(STEPS):
    data = batch().part(STEPS * rank + step, STEPS * world)
    assert model.lm_head.weight.numel() == 0, "the head is in memory between the steps"
    loss = engine(input_ids=data.tokens, at_head=at_head(data))["loss"]
    engine.backward(loss)
    total += loss.detach() / STEPS
    if step < STEPS - 1:
        engine.step()
found = {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}
one.check(mean_over_processes(total), found)
try:
    tvkd(torch.randn(2, 7, 16), model.lm_head.weight, data)
except ValueError as error:
    assert "weight: expected" in str(error), error
else:
    raise AssertionError("a head that is not in memory is not refused")
