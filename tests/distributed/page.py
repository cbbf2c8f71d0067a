"""The code of docs/distributed.md on two processes: each gradient is what PyTorch gives."""

from __future__ import annotations

import tempfile
from pathlib import Path

import formulas
import torch
import torch.distributed as dist
from one_process import batch, processes, tiny_model, whole
from pages import blocks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import fastpref

AT_HEAD, FSDP2, SHARDED, GROUP = blocks("docs/distributed.md")
rank, world = processes()
data = batch()
path = Path(tempfile.gettempdir()) / "page"
if rank == 0:
    tiny_model().save_pretrained(path)
dist.barrier()


def hidden_states(model):
    return model.model(input_ids=data.tokens).last_hidden_state[:, :-1]


plain = tiny_model()
weight = plain.lm_head.weight
formulas.tvkd_loss(hidden_states(plain), weight, data.labels, data.shaping, beta=0.01).backward()
expected = weight.grad
names = {
    "fastpref": fastpref,
    "fully_shard": fully_shard,
    "DistributedDataParallel": DistributedDataParallel,
    "DistributedConfig": DistributedConfig,
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "path": path,
    "input_ids": data.tokens,  # the same on all processes: so is the mean over them
    "labels": data.labels,
    "shaping": data.shaping,
}
for code in (AT_HEAD, FSDP2, SHARDED):
    names["model"] = tiny_model()
    exec(code, names)
    if code is SHARDED:
        names["loss"].backward()
    model = getattr(names["model"], "module", names["model"])
    torch.testing.assert_close(whole(model.lm_head.weight.grad), expected, rtol=1e-4, atol=1e-6)

shard = weight.detach().tensor_split(world)[rank].requires_grad_()
hidden = hidden_states(plain).detach()
names |= {"weight_shard": shard, "tensor_parallel_group": dist.group.WORLD, "hidden": hidden}
exec(GROUP, names)
names["loss"].backward()
rows = expected.tensor_split(world)[rank]
torch.testing.assert_close(shard.grad, rows, rtol=1e-4, atol=1e-6)
