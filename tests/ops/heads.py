"""Random heads, hidden states and labels, and what the reference makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastpref import reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Head(NamedTuple):
    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (...)
    options: dict[str, Any]

    def to(self, dtype: torch.dtype, *, trained: bool) -> Head:
        def leaf(tensor: Tensor, wants: bool) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_(wants)

        bias = None if self.bias is None else leaf(self.bias, trained)
        return self._replace(
            hidden=leaf(self.hidden, True), weight=leaf(self.weight, trained), bias=bias
        )

    def gradients(self) -> list[Tensor]:
        leaves = (self.hidden, self.weight, self.bias)
        return [leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad]


@st.composite
def heads(draw: st.DrawFn, *, max_vocab: int = 300) -> Head:
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
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.5])),
        "softcap": draw(st.sampled_from([None, 3.0, 30.0])),
    }
    return Head(
        hidden=(scale * normal(*leading, width)).half().float(),
        weight=normal(vocab, width).half().float(),
        bias=normal(vocab).half().float() if draw(st.booleans()) else None,
        labels=labels.masked_fill(ignored, ignore_index),
        options={**options, "ignore_index": ignore_index},
    )


def reference_logps(head: Head) -> Tensor:
    return reference.linear_logps(
        head.hidden, head.weight, head.labels, bias=head.bias, **head.options
    )


def reference_logsumexp(head: Head) -> Tensor:
    options = {k: v for k, v in head.options.items() if k != "ignore_index"}
    return reference.linear_logsumexp(head.hidden, head.weight, bias=head.bias, **options)
