"""The code of docs/distributed.md on two processes: each gradient is what PyTorch gives."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from one_process import batch, processes, tiny_model, whole
from pages import blocks
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import logsigmoid
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


def gradient(model):
    """Of the head, from full logits and the page's beta."""
    logits = model(input_ids=data.tokens).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, data.labels.clamp_min(0).unsqueeze(2)).squeeze(2)
    sums = torch.where(data.labels == -100, 0, logps).sum(1)
    chosen, rejected = (0.01 * sums - data.shaping).chunk(2)
    (-logsigmoid(chosen - rejected).mean()).backward()
    return model.lm_head.weight.grad


expected = gradient(tiny_model())
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

one = tiny_model()
shard = one.lm_head.weight.detach().tensor_split(world)[rank].requires_grad_()
hidden = one.model(input_ids=data.tokens).last_hidden_state[:, :-1].detach()
names |= {"weight_shard": shard, "tensor_parallel_group": dist.group.WORLD, "hidden": hidden}
exec(GROUP, names)
names["loss"].backward()
rows = expected.tensor_split(world)[rank]
torch.testing.assert_close(shard.grad, rows, rtol=1e-4, atol=1e-6)
