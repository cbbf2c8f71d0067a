"""Random pairs, padded and packed, with masks of all kinds, and what tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import formulas
import torch
from closeness import assert_no_worse
from hypothesis import strategies as st
from torch import Tensor

from fastpref import Head

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Batch(NamedTuple):
    """Pairs of responses whose numbers every dtype holds exactly."""

    states: Tensor  # (2B, T + 1, H) one hidden state more than labels
    labels: Tensor  # (2B, T)
    kept: list[int]  # labels of each row that its packed form keeps
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    transform: dict[str, Any]  # logit_scale, softcap
    temperature: float
    ignore_index: int
    generator: torch.Generator

    def logps(self) -> Tensor:
        """Log-probabilities (2B, T) of the labels in float64."""
        return formulas.linear_logps(
            self.states[:, :-1],
            self.head(self._asdict()),
            self.labels,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
        )

    def head(self, leaves: dict[str, Any]) -> Head:
        """The head of some leaves."""
        return Head(leaves["weight"], leaves.get("bias"), **self.transform)

    def largest_sum(self) -> float:
        """The size of the largest log-probability of a response."""
        return float(self.logps().abs().sum(1).max())

    @property
    def mask(self) -> Tensor:
        return self.labels != self.ignore_index

    def normal(self, *shape: int) -> Tensor:
        """More random numbers of the kind the batch is made of."""
        return exact_everywhere(torch.randn(*shape, generator=self.generator))

    def leaves(self, dtype: torch.dtype, trains: set[str], **more: Tensor) -> dict[str, Tensor]:
        """Copies in ``dtype``; those named in ``trains`` want a gradient."""
        tensors = {"states": self.states, "weight": self.weight, **more}
        if self.bias is not None:
            tensors["bias"] = self.bias
        for name, tensor in tensors.items():
            assert torch.equal(tensor, exact_everywhere(tensor)), name
        return {
            name: tensor.detach().to(dtype).clone().requires_grad_(name in trains)
            for name, tensor in tensors.items()
        }

    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0] + [kept + 1 for kept in self.kept]).cumsum(0)

    def packed_labels(self) -> Tensor:
        last = self.labels.new_full((1,), self.ignore_index)
        rows = zip(self.labels, self.kept, strict=True)
        return torch.cat([torch.cat((row[:kept], last)) for row, kept in rows])

    def pack(self, per_state: Tensor) -> Tensor:
        """(2B, T + 1, ...) to (N, ...)."""
        return torch.cat([row[: kept + 1] for row, kept in zip(per_state, self.kept, strict=True)])


def exact_everywhere(values: Tensor) -> Tensor:
    """Round to numbers that float16 and bfloat16 hold, so that no dtype starts with an error."""
    return values.bfloat16().half().double()


def masks(length: int) -> st.SearchStrategy[list[bool]]:
    """Prompts, padding, gaps, everything, nothing."""
    boundary = st.integers(0, length)
    return st.one_of(
        boundary.map(lambda start: [t >= start for t in range(length)]),
        st.tuples(boundary, boundary).map(
            lambda ends: [min(ends) <= t < max(ends) for t in range(length)]
        ),
        st.lists(st.booleans(), min_size=length, max_size=length),
        st.just([False] * length),
    )


@st.composite
def batches(draw: st.DrawFn, *, min_vocab: int = 1, min_labels: int = 0) -> Batch:
    """Shapes, masks and head options of all kinds; ``min_labels`` in every row."""
    pairs = draw(st.integers(1, 3))
    length = draw(st.integers(max(1, min_labels), 7))
    width = draw(st.sampled_from([1, 3, 8, 16]))
    vocab = draw(st.sampled_from([size for size in (1, 2, 7, 33, 70) if size >= min_vocab]))
    ignore_index = draw(st.sampled_from([-100, -1, 0] if vocab > 1 else [-100, -1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    row_masks = masks(length).filter(lambda mask: sum(mask) >= min_labels)
    everything_ignored = min_labels == 0 and draw(st.integers(0, 9)) == 9
    rows = [[False] * length if everything_ignored else draw(row_masks) for _ in range(2 * pairs)]
    mask = torch.tensor(rows)
    smallest = 1 if ignore_index == 0 else 0
    tokens = torch.randint(smallest, vocab, mask.shape, generator=generator)
    used = [max((t + 1 for t, labelled in enumerate(row) if labelled), default=0) for row in rows]

    scale = draw(st.sampled_from([0.25, 1.0]))
    return Batch(
        states=exact_everywhere(
            scale * torch.randn(2 * pairs, length + 1, width, generator=generator)
        ),
        labels=torch.where(mask, tokens, ignore_index),
        kept=[draw(st.integers(end, length)) for end in used],
        weight=exact_everywhere(torch.randn(vocab, width, generator=generator)),
        bias=exact_everywhere(torch.randn(vocab, generator=generator))
        if draw(st.booleans())
        else None,
        temperature=draw(st.sampled_from([1.0, 0.5, 2.3])),
        transform={
            "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.5])),
            "softcap": draw(st.sampled_from([None, 3.0, 30.0])),
        },
        ignore_index=ignore_index,
        generator=generator,
    )


def some_of(*names: str) -> st.SearchStrategy[set[str]]:
    """A subset that is not empty."""
    return st.sets(st.sampled_from(names), min_size=1)


def hold_to_reference(
    ours: Callable[[dict[str, Tensor]], Tensor],
    plain: Callable[[dict[str, Tensor]], Tensor],
    leaves: Callable[[torch.dtype], dict[str, Tensor]],
    dtype: torch.dtype,
    *,
    scale: float = 0.0,
    sharpness: float = 0.0,
) -> None:
    """Value and gradients of ``ours`` are no worse than those of ``plain`` in the same dtype.

    A value that is a difference of numbers of size ``scale`` has their roundoff, and a gradient
    multiplied by the exponential of one of size ``sharpness`` has that, relative to itself.
    """
    exact_leaves, plain_leaves, our_leaves = leaves(torch.float64), leaves(dtype), leaves(dtype)
    exact, rough, found = plain(exact_leaves), plain(plain_leaves), ours(our_leaves)
    hold_difference(found.detach(), rough.detach(), exact.detach(), dtype, scale)
    if not exact.requires_grad:
        return
    incoming = torch.linspace(0.5, 1.5, exact.numel(), dtype=torch.float64).view(exact.shape)
    for result in (exact, rough, found):
        if not result.requires_grad:  # it does not read what trains: its gradients count as zeros
            continue
        result.backward(incoming.to(result.dtype))
    for name, leaf in our_leaves.items():
        if not leaf.requires_grad:
            assert leaf.grad is None, name
            continue
        found_gradient, rough_gradient, exact_gradient = (
            torch.zeros_like(one[name]) if one[name].grad is None else one[name].grad
            for one in (our_leaves, plain_leaves, exact_leaves)
        )
        assert found_gradient.dtype == leaf.dtype, name
        size = sharpness * float(exact_gradient.norm())
        hold_difference(found_gradient, rough_gradient, exact_gradient, dtype, size)


def hold_difference(
    found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, scale: float
) -> None:
    """`assert_no_worse`, and allow one unit roundoff of ``scale`` beside."""
    assert found.shape == plain.shape == exact.shape
    # The tolerance is 16 unit roundoffs of what is compared, and a perfect entry adds to it.
    perfect = exact.new_tensor([scale / 16])
    values = (torch.cat((one.reshape(-1).double(), perfect)) for one in (found, plain, exact))
    assert_no_worse(*values, dtype)


def hold_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Float64 results of two ways of computing the same."""
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(
            values, expected[name], rtol=1e-10, atol=1e-12, msg=lambda text, name=name: name + text
        )
