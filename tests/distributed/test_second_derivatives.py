"""Second derivatives of sharded heads are refused as those of whole ones; one process is enough."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fastpref
from fastpref import Head


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["linear_logps", "linear_divergence"])
@pytest.mark.parametrize("trained", [False, True])
def test_second_derivatives_are_refused(group, name, trained):
    hidden, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([1, -100, 5])
    head = Head(torch.randn(7, 4, requires_grad=trained), group=group)
    teacher = torch.randn(3, 5), Head(torch.randn(7, 5), group=group)

    def total():
        if name == "linear_logps":
            return fastpref.linear_logps(hidden, head, labels).square().sum()
        found = fastpref.linear_divergence(hidden, head, *teacher, labels, kind="jsd")
        return found.square().sum()

    (gradient,) = torch.autograd.grad(total(), hidden, create_graph=True)
    refused = rf"^fastpref\.{name}: second derivatives are not supported"
    with pytest.raises(NotImplementedError, match=refused):
        gradient.sum().backward()
    total().backward()
    assert hidden.grad is not None and (head.weight.grad is not None) == trained
