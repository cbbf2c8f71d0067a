"""Random heads, hidden states and labels, and what the reference makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import formulas
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastpref import Head

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    hidden: Tensor  # (..., H)
    head: Head
    labels: Tensor  # (...)
    options: dict[str, Any] = {}  # of every function: temperature, ignore_index

    def to(self, dtype: torch.dtype, *, trained: bool) -> Case:
        def leaf(tensor: Tensor, wants: bool) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_(wants)

        weight, bias = self.head[:2]
        bias = None if bias is None else leaf(bias, trained)
        head = self.head._replace(weight=leaf(weight, trained), bias=bias)
        return self._replace(hidden=leaf(self.hidden, True), head=head)

    def gradients(self) -> list[Tensor]:
        leaves = (self.hidden, self.head.weight, self.head.bias)
        return [leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad]


@st.composite
def cases(draw: st.DrawFn, *, max_vocab: int = 300) -> Case:
    """Shapes, options and masks of all kinds; values as large as real logits."""
    leading = draw(st.sampled_from([(1,), (5,), (2, 3), (17,), (2, 2, 3)]))
    width = draw(st.sampled_from([1, 3, 8, 33]))
    vocab = draw(st.sampled_from([1, 2, 7, 128, 129, max_vocab]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scale = draw(st.sampled_from([0.1, 1.0, 6.0]))
    labels = torch.randint(0, vocab, leading, generator=generator)
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    ignored = torch.rand(leading, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    options = {
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.3])),
        "ignore_index": ignore_index,
    }
    logit_scale = draw(st.sampled_from([1.0, 0.25, -1.5]))
    softcap = draw(st.sampled_from([None, 3.0, 30.0]))
    hidden = (scale * normal(*leading, width)).half().float()
    weight = normal(vocab, width).half().float()
    bias = normal(vocab).half().float() if draw(st.booleans()) else None
    # What all logits share changes no probability, and takes digits from every one of them. (A soft
    # cap lets none be large: beyond it all that is left of a slope is rounding.)
    offset = draw(st.sampled_from([0.0, 0.0, 30.0, -300.0]))
    if offset and softcap is None:
        bias = torch.full((vocab,), offset) if bias is None else (bias + offset).half().float()
    head = Head(weight, bias, logit_scale, softcap)
    return Case(hidden, head, labels.masked_fill(ignored, ignore_index), options)


def reference_logps(case: Case) -> Tensor:
    return formulas.linear_logps(case.hidden, case.head, case.labels, **case.options)


def reference_logsumexp(case: Case) -> Tensor:
    temperature = case.options.get("temperature", 1.0)
    return formulas.linear_logsumexp(case.hidden, case.head, temperature=temperature)
