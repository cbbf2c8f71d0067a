"""Random students and teachers, and what the reference makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import formulas
import torch
from cases import Case, cases
from closeness import assert_no_worse
from hypothesis import strategies as st
from torch import Tensor

import fastpref.ops
from fastpref import Head
from fastpref.ops.divergences import KINDS

# What every kind is called with here, beside its name.
OPTIONS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in KINDS},
    "jsd": {"beta": 0.5},
    "jsd, uneven": {"beta": 0.1},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "skew_reverse_kl, even": {"alpha": 0.5},
    "skew_reverse_kl, detached": {"alpha": 0.3, "detach_mixture": True},
    "advantage, clipped": {"clip": (-1.0, 0.5)},
    "advantage, clipped above": {"clip": (None, 1.0)},
}
EVERY = list(OPTIONS)
Model = tuple[Tensor, Head]


class TwoHeads(NamedTuple):
    student: Case
    teacher: Model
    reference: Model  # for the advantage
    teacher_temperature: float | None

    def to(self, dtype: torch.dtype, *, trained: bool) -> TwoHeads:
        def model(one: Model) -> Model:
            hidden, (weight, bias, *more) = one[0], one[1][:4]
            bias = None if bias is None else bias.to(dtype)
            return hidden.to(dtype), Head(weight.to(dtype), bias, *more)

        student = self.student.to(dtype, trained=trained)
        return self._replace(
            student=student, teacher=model(self.teacher), reference=model(self.reference)
        )

    def nearby(self) -> TwoHeads:
        """In float64, but for errors in the inputs that float32 would not notice."""
        generator = torch.Generator().manual_seed(0)

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            near = tensor.detach().double() * (1 + 2.0**-20 * noise)
            return near.requires_grad_(tensor.requires_grad)

        def model(one: Model) -> Model:
            return moved(one[0]), one[1]._replace(bias=moved(one[1].bias))

        exact = self.to(torch.float64, trained=self.student.head.weight.requires_grad)
        hidden, head = model(exact.student[:2])
        return exact._replace(
            student=exact.student._replace(hidden=hidden, head=head),
            teacher=model(exact.teacher),
            reference=model(exact.reference),
        )

    def labelled(self) -> Tensor:
        return self.student.labels != self.student.options["ignore_index"]

    def arguments(self, name: str) -> dict[str, Any]:
        given = {**OPTIONS[name], **self.student.options, "kind": name.partition(",")[0]}
        return {**given, "teacher_temperature": self.teacher_temperature}

    def run(self, name: str, function: Any = fastpref.ops.linear_divergence, **more: object) -> Any:
        given = self.arguments(name)
        if given["kind"] == "advantage":
            given |= dict(zip(("reference_hidden", "reference_head"), self.reference, strict=True))
        hidden, head, labels, _ = self.student
        return function(hidden, head, *self.teacher, labels, **given, **more)

    def expected(self, name: str) -> Tensor:
        given = self.arguments(name)
        if given["kind"] == "advantage":
            given["reference"] = self.reference
        return formulas.linear_divergence(
            self.student[:2], self.teacher, self.student.labels, **given
        )


def hold(found: Tensor, plain: Tensor, nearby: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`assert_no_worse`, and than the formula itself where plain PyTorch was exact by luck."""
    rough = max(plain, nearby, key=lambda one: float((one.double() - exact).norm()))
    # Beside a perfect entry, for what float64 itself rounds away where both models are certain.
    perfect = exact.new_tensor([1e-9])
    values = (torch.cat((one.reshape(-1).double(), perfect)) for one in (found, rough, exact))
    assert_no_worse(*values, dtype)


@st.composite
def two_heads(draw: st.DrawFn, *, max_vocab: int = 300) -> TwoHeads:
    """A student of `cases`, and a teacher and a reference near it and far from it."""
    student = draw(cases(max_vocab=max_vocab))
    hidden, head = student.hidden, student.head
    vocab = head.weight.shape[0]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def model() -> Model:
        if draw(st.booleans()):  # all but the student
            step = draw(st.sampled_from([2.0**-8, 0.1]))
            return (hidden + step * normal(*hidden.shape)).half().float(), head
        width = draw(st.sampled_from([1, 5, 16]))
        scale = draw(st.sampled_from([0.1, 1.0, 4.0]))
        bias = normal(vocab).half().float() if draw(st.booleans()) else None
        softcap = draw(st.sampled_from([None, 5.0]))
        states = (scale * normal(*hidden.shape[:-1], width)).half().float()
        return states, Head(normal(vocab, width).half().float(), bias, 0.5, softcap)

    return TwoHeads(student, model(), model(), draw(st.sampled_from([None, 0.7])))
