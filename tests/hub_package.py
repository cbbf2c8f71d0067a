"""A page's code that uses the package for the Hub's library, against plain PyTorch."""

from __future__ import annotations

from typing import Any

import formulas
import torch
from closeness import assert_no_worse
from pages import blocks
from torch import Tensor


def check_page(page: str) -> Any:
    """Run the page's code, hold its numbers and gradients, and return the package."""
    found: dict[str, Any] = {}
    (code,) = blocks(page)
    exec(code, found)
    hidden, weight = found["hidden"], found["weight"]
    gradients = (hidden.grad, weight.grad)
    values = (found["logps"], found["values"], found["divergence"], *gradients)
    plain, exact = (expected(found, dtype) for dtype in (torch.float32, torch.float64))
    for one, one_plain, one_exact in zip(values, plain, exact, strict=True):
        assert_no_worse(one.detach(), one_plain, one_exact, torch.float32)
    return found["heads"]


def expected(found: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The same numbers and gradients by full logits."""
    hidden, weight = (found[name].detach().to(dtype) for name in ("hidden", "weight"))
    teacher = [found[f"teacher_{name}"].detach().to(dtype) for name in ("hidden", "weight")]
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    student = hidden, formulas.Head(weight, softcap=30.0)
    log_q = formulas.logits(*student).log_softmax(-1)
    logps = formulas.linear_logps(*student, found["labels"])
    values = formulas.linear_logsumexp(*student)
    log_p = formulas.logits(*teacher).log_softmax(-1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    divergence = sum((log.exp() * (log - log_m)).sum(-1) for log in (log_p, log_q)) / 2
    gradients = torch.autograd.grad((values + divergence - logps).mean(), leaves)
    return [one.detach() for one in (logps, values, divergence, *gradients)]


def operators(namespace: str) -> set[str]:
    """Names of the operators that are registered under ``namespace``."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.partition("::")[2] for name in names if name.startswith(f"{namespace}::")}
