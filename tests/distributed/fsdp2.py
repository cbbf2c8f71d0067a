"""FSDP2: through the head, and with the head's DTensor outside of any forward pass."""

from __future__ import annotations

import torch
from one_process import (
    OneProcess,
    at_head,
    batch,
    gradients,
    mean_over_processes,
    processes,
    tiny_model,
    tvkd,
)
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastpref.models.fused_head import add_fused_head


def with_lora(model):
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def plain(model):
    return model


def shard(model, *parts, mesh=None):
    for part in (*model.model.layers, *parts, model):
        fully_shard(part, mesh=mesh)


def through_head(prepare, data, *, shard_head=False):
    model = prepare(tiny_model())
    base = model.get_base_model() if prepare is with_lora else model
    add_fused_head(model)
    shard(base, *([base.lm_head] if shard_head else []))
    loss = model(input_ids=data.tokens, at_head=at_head(data))["loss"]
    loss.backward()
    return mean_over_processes(loss), gradients(model)


def accumulated(rank, world):
    """Two steps of one pair, reduced after the second, layers computed again in backward."""
    model = tiny_model()
    add_fused_head(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shard(model)
    total = 0
    for step in range(2):
        data = batch().part(2 * rank + step, 2 * world)
        model.set_requires_gradient_sync(step == 1)
        loss = model(input_ids=data.tokens, at_head=at_head(data))["loss"] / 2
        loss.backward()
        total = total + loss.detach()
    return mean_over_processes(total), gradients(model)


def outside(prepare, data, *, mesh=None):
    model = prepare(tiny_model())
    base = model.get_base_model() if prepare is with_lora else model
    shard(base, base.model, mesh=mesh)
    hidden = base.model(input_ids=data.tokens).last_hidden_state[:, :-1]
    weight = base.lm_head.weight
    assert isinstance(weight, DTensor) and not isinstance(hidden, DTensor)
    loss = tvkd(hidden, weight, data)
    loss.backward()
    return mean_over_processes(loss), gradients(model)


rank, world = processes()
data = batch().part(rank, world)
hybrid = [
    init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "fsdp"))
    for shape in ((1, world), (world, 1))
]
for prepare in (plain, with_lora):
    one = OneProcess(prepare(tiny_model()), batch())
    one.check(*through_head(prepare, data))
    one.check(*through_head(prepare, data, shard_head=True))
    one.check(*outside(prepare, data))
one = OneProcess(tiny_model(), batch())
one.check(*accumulated(rank, world))
for mesh in hybrid:
    one.check(*outside(plain, data, mesh=mesh))
