"""A head sharded over the vocabulary: each process has rows of it, the numbers are the whole's."""

from __future__ import annotations

import tempfile
from pathlib import Path

import sharded_divergences
import torch
import torch.distributed as dist
from closeness import assert_no_worse
from one_process import OneProcess, at_head, batch, processes, tiny_model, tvkd, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import fastpref
from fastpref import Head
from fastpref.models.fused_head import add_fused_head
from fastpref.ops.linear_stats import FORMULAS, OF_LABELS

WIDTH = 6
ROWS = (slice(0, 9), slice(9, None))  # of the head, on each process
OPTIONS = {
    "plain": {},
    "transformed": {"temperature": 1.7, "logit_scale": 0.8, "softcap": 3.0},
    "no scratch": {"scratch_bytes": 0},
    "offset": {},
    "all rows": {"compact": False},
    "label 0 ignored": {"ignore_index": 0},
}


def tensors(vocabulary, *, trains, has_bias, offset=0.0, ignored=-100, dtype=torch.float32):
    torch.manual_seed(3)
    hidden, weight = torch.randn(2, 5, WIDTH), 2 * torch.randn(vocabulary, WIDTH)
    bias = torch.randn(vocabulary) + offset if has_bias else None
    labels = torch.randint(1, vocabulary, (2, 5))
    labels[0, :2], labels[1, 4] = ignored, vocabulary - 1
    coefficients = torch.randn(2, 2, 5)
    head = [None if one is None else one.to(dtype).requires_grad_(trains) for one in (weight, bias)]
    return hidden.to(dtype).requires_grad_(), *head, labels, coefficients.to(dtype)


def numbers(logps, lse, coefficients, *leaves):
    """Outputs, and the gradients of a loss that reads both."""
    ((logps * coefficients[0]).sum() + (lse * coefficients[1]).sum()).backward()
    trained = [one for one in leaves if one is not None and one.requires_grad]
    return [logps.detach(), lse.detach(), *(whole(one.grad) for one in trained)]


def of_logits(dtype, vocabulary, options, **kind):
    """PyTorch's own numbers, from full logits."""
    hidden, weight, bias, labels, coefficients = tensors(vocabulary, dtype=dtype, **kind)
    ignored = labels == kind.get("ignored", -100)
    scores = options.get("logit_scale", 1) * torch.nn.functional.linear(hidden, weight, bias)
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    temperature = options.get("temperature", 1)
    logits = scores / temperature
    found = logits.log_softmax(-1).gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1))
    logps = found.squeeze(-1).masked_fill(ignored, 0)
    lse = temperature * logits.logsumexp(-1).masked_fill(ignored, 0)
    return numbers(logps, lse, coefficients, hidden, weight, bias)


def with_stats(hidden, head, labels, options):
    options = dict(options)
    transform = {name: options.pop(name) for name in ("logit_scale", "softcap") if name in options}
    head = head._replace(**transform)
    return fastpref.linear_logps_with_stats(hidden, head, labels, **options)


def logps_and_lse(hidden, head, labels, options):
    return with_stats(hidden, head, labels, options)[:2]


def of_dtensors(mesh, placements, vocabulary, options, *, hidden_is_dtensor=False, **kind):
    hidden, *head, labels, coefficients = tensors(vocabulary, **kind)
    weight, bias = (
        None
        if one is None
        else distribute_tensor(one.detach(), mesh, placements).requires_grad_(kind["trains"])
        for one in head
    )
    given = hidden
    if hidden_is_dtensor:
        given = DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim)
    logps, lse = logps_and_lse(given, Head(weight, bias), labels, options)
    assert not isinstance(logps, DTensor)
    return numbers(logps, lse, coefficients, hidden, weight, bias)


def of_shards(rank, vocabulary, options, **kind):
    """As Megatron has it, but for sizes that differ."""
    hidden, *head, labels, coefficients = tensors(vocabulary, **kind)
    weight, bias = (
        None if one is None else one.detach()[ROWS[rank]].clone().requires_grad_(kind["trains"])
        for one in head
    )
    head = Head(weight, bias, group=dist.group.WORLD)
    logps, lse = logps_and_lse(hidden, head, labels, options)
    found = numbers(logps, lse, coefficients, hidden, weight, bias)
    parts = [[None, None] for _ in found[3:]]
    for place, one in zip(parts, found[3:], strict=True):
        dist.all_gather_object(place, one)
    return [*found[:3], *(torch.cat(place) for place in parts)]


def check(found, plain, exact):
    for ours, theirs, witness in zip(found, plain, exact, strict=True):
        assert_no_worse(ours, theirs, witness, torch.float32)


def check_every_option(rank, mesh):
    for name, options in OPTIONS.items():
        for trains in (False, True):
            kind = {"trains": trains, "has_bias": name != "plain"}
            kind["ignored"] = options.get("ignore_index", -100)
            kind["offset"] = 300.0 if name == "offset" else 0.0
            exact = of_logits(torch.float64, 17, options, **kind)
            plain = of_logits(torch.float32, 17, options, **kind)
            check(of_dtensors(mesh, [Shard(0)], 17, options, **kind), plain, exact)
            check(of_shards(rank, 17, options, **kind), plain, exact)


def check_other_placements(world):
    kind = {"trains": True, "has_bias": True}
    exact, plain = (of_logits(one, 17, {}, **kind) for one in (torch.float64, torch.float32))
    for shape in ((1, world), (world, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("fsdp", "tp"))
        for placements in ([Shard(0), Replicate()], [Replicate(), Shard(0)]):
            for hidden_is_dtensor in (False, True):
                found = of_dtensors(
                    mesh, placements, 17, {}, hidden_is_dtensor=hidden_is_dtensor, **kind
                )
                check(found, plain, exact)
    unnamed = init_device_mesh("cpu", (world,))
    check(of_dtensors(unnamed, [Shard(0)], 17, {}, **kind), plain, exact)
    return unnamed


def check_without_labels(mesh):
    hidden, weight, _, _, coefficients = tensors(17, trains=True, has_bias=False)
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    expected = 2 * (exact[0] @ exact[1].T / 2).logsumexp(-1)
    (expected * coefficients[0]).sum().backward()
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    found = fastpref.linear_logsumexp(hidden, sharded, temperature=2.0)
    (found * coefficients[0]).sum().backward()
    for ours, theirs in zip(
        (found, hidden.grad, whole(sharded.grad)),
        (expected, *(one.grad for one in exact)),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=2e-6)


def check_without_any_label(mesh):
    hidden, weight, *_ = tensors(17, trains=True, has_bias=False)
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    for compact in (True, False):
        sharded = sharded.detach().requires_grad_()
        labels = torch.full((2, 5), -100)
        logps = fastpref.linear_logps(hidden, sharded, labels, compact=compact)
        hidden.grad = None
        logps.sum().backward()
        assert not logps.any() and not whole(sharded.grad).any() and not hidden.grad.any()


def check_traffic(mesh):
    """Numbers of tokens in forward, the hidden states' gradient in backward, never the head."""
    hidden, weight, _, labels, _ = tensors(17, trains=True, has_bias=False)
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    with CommDebugMode() as forward:
        logps = fastpref.linear_logps(hidden, sharded, labels)
    with CommDebugMode() as backward:
        logps.sum().backward()
    assert list(map(str, forward.get_comm_counts())) == ["c10d.allgather_"]
    assert (forward.get_total_counts(), backward.get_total_counts()) == (1, 1)


def check_masked_shard(mesh):
    """A process that has nothing but padding, and a model that is certain."""
    hidden, weight, bias, labels, coefficients = tensors(17, trains=True, has_bias=True)
    labels = labels.clamp_max(8)
    with torch.no_grad():
        bias[9:] = -torch.inf
        bias[labels[1, 1]] += 30
    whole_leaves = [one.detach().clone().requires_grad_() for one in (hidden, weight, bias)]
    logps, lse = logps_and_lse(whole_leaves[0], Head(*whole_leaves[1:]), labels, {})
    expected = numbers(logps, lse, coefficients, *whole_leaves)
    sharded = [distribute_tensor(one.detach(), mesh, [Shard(0)]) for one in (weight, bias)]
    sharded = [one.requires_grad_() for one in sharded]
    logps, lse = logps_and_lse(hidden, Head(*sharded), labels, {})
    for ours, theirs in zip(
        numbers(logps, lse, coefficients, hidden, *sharded), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


def check_stats(rank, mesh):
    """Entropy and top-1 of the whole vocabulary, also where one shard is masked or certain."""
    for name, options in OPTIONS.items():
        for peak in (0, 30, 60):
            ignored = options.get("ignore_index", -100)
            kind = {"trains": False, "has_bias": True, "ignored": ignored}
            hidden, weight, bias, labels, _ = tensors(17, **kind)
            bias[labels[1, 1]] += peak
            if name == "plain":
                bias[9:] = -torch.inf
                labels = labels.clamp_max(8)
            plain = with_stats(hidden, Head(weight, bias), labels, options)
            exact = [one.double() for one in (hidden, weight, bias)]
            exact = with_stats(exact[0], Head(*exact[1:]), labels, options)
            sharded = Head(*(distribute_tensor(one, mesh, [Shard(0)]) for one in (weight, bias)))
            own = Head(weight[ROWS[rank]], bias[ROWS[rank]], group=dist.group.WORLD)
            for head in (sharded, own):
                found = with_stats(hidden, head, labels, options)
                assert_no_worse(found.entropy, plain.entropy, exact.entropy, torch.float32)
                assert torch.equal(found.is_top1, exact.is_top1)
                assert found.is_top1.any() or not peak
                assert not found.is_top1[labels == ignored].any()
    found = with_stats(hidden, own, labels + 17, {"compact": False})
    assert found.entropy.isnan().all() and not found.is_top1.any()


@torch.no_grad()
def check_every_statistic(rank, mesh):
    """`linear_stats` of the whole vocabulary, with labels and without, of all rows and of some."""
    for name, options in OPTIONS.items():
        for has_labels in (True, False):
            ignored = options.get("ignore_index", -100)
            hidden, weight, bias, labels, _ = tensors(
                17, trains=False, has_bias=True, ignored=ignored
            )
            if name == "offset":
                bias += 100
            if name == "plain":
                bias[9:] = -torch.inf
                labels = labels.clamp_max(8)
            names = [one for one in FORMULAS if has_labels or one not in OF_LABELS]
            arguments = dict(options, stats=names)
            arguments.pop("scratch_bytes", None)
            of_head = {
                one: arguments.pop(one) for one in ("logit_scale", "softcap") if one in arguments
            }
            if has_labels:
                arguments["labels"] = labels
            plain = fastpref.linear_stats(hidden, Head(weight, bias, **of_head), **arguments)
            wide = Head(weight.double(), bias.double(), **of_head)
            exact = fastpref.linear_stats(hidden.double(), wide, **arguments)
            sharded = (distribute_tensor(one, mesh, [Shard(0)]) for one in (weight, bias))
            own = Head(weight[ROWS[rank]], bias[ROWS[rank]], group=dist.group.WORLD)
            for head in (Head(*sharded), own):
                found = fastpref.linear_stats(hidden, head._replace(**of_head), **arguments)
                assert list(found) == names
                for one in names:
                    if found[one].dtype == torch.bool:
                        assert torch.equal(found[one], exact[one])
                    else:
                        assert_no_worse(found[one], plain[one], exact[one], torch.float32)
    wrong = {"labels": labels + 17, "stats": ["target_logp", "is_top1", "entropy"]}
    found = fastpref.linear_stats(hidden, own, **wrong, compact=False)
    assert found["target_logp"].isnan().all() and not found["is_top1"].any()
    refused("in [0, 17)", lambda: fastpref.linear_stats(hidden, own, **wrong))


def check_refusals(mesh, unnamed):
    hidden, weight, bias, labels, _ = tensors(17, trains=False, has_bias=True)
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    columns = distribute_tensor(weight, unnamed, [Shard(1)])
    by_batch = DTensor.from_local(hidden[:1], mesh, [Shard(0)])
    wrong = labels.clone()
    wrong[1, 1] = 17
    for words, arguments in {
        "weight: expected a DTensor placed": (hidden, columns, labels),
        "bias: expected": (hidden, Head(sharded, bias), labels),
        "hidden: expected": (by_batch, sharded, labels),
        "in [0, 17)": (hidden, sharded, wrong),
        "weight: expected a plain": (hidden, Head(sharded, group=dist.group.WORLD), labels),
        "group: expected": (hidden, Head(weight, group="tp"), labels),
    }.items():
        refused(words, lambda arguments=arguments: fastpref.linear_logps(*arguments))
    with torch.no_grad():
        stats = {"stats": ["entropy"]}
        gathered = distribute_tensor(weight, unnamed, [Shard(0)])
        found = fastpref.linear_stats(hidden, gathered, **stats)["entropy"]
        assert torch.equal(found, fastpref.linear_stats(hidden, weight, **stats)["entropy"])
        nan = fastpref.linear_logps(hidden, sharded, wrong, compact=False)
    assert nan[1, 1].isnan() and nan.isnan().sum() == 1


def refused(words, call):
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def check_transformers(folder, rank):
    """What transformers makes of `tp_plan="auto"`: every process has the whole batch."""
    one, data = OneProcess(tiny_model(), batch()), batch()
    if rank == 0:
        tiny_model().save_pretrained(folder)
    dist.barrier()
    for outside in (True, False):
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=2)
        ).train()
        weight = model.lm_head.weight
        assert isinstance(weight, DTensor) and weight.placements == (Shard(0),)
        assert weight.device_mesh.mesh_dim_names == ("tp",)
        if outside:
            hidden = model.model(input_ids=data.tokens).last_hidden_state
            loss = tvkd(hidden[:, :-1], weight, data)
        else:
            add_fused_head(model)
            # Without gradients transformers computes with plain shards, which must not be ours.
            with torch.no_grad():
                evaluated = model(input_ids=data.tokens, at_head=at_head(data))["loss"]
            loss = model(input_ids=data.tokens, at_head=at_head(data))["loss"]
            torch.testing.assert_close(loss.detach(), evaluated)
        loss.backward()
        found = {name: whole(one.grad) for name, one in model.named_parameters()}
        one.check(loss, found)


rank, world = processes()
mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
check_every_option(rank, mesh)
unnamed = check_other_placements(world)
check_without_labels(mesh)
check_without_any_label(mesh)
check_traffic(mesh)
check_masked_shard(mesh)
check_stats(rank, mesh)
check_every_statistic(rank, mesh)
check_refusals(mesh, unnamed)
sharded_divergences.check_all(rank, mesh)
check_transformers(Path(tempfile.gettempdir()), rank)
