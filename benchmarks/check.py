"""Is a contender right? Its values and gradients against a wider run with full logits."""

from dataclasses import dataclass

import torch
from contenders import Contender, Gives, Mode
from head_shapes import InputSet
from inputs import ROWS
from peers import tvkd
from torch import Tensor

# Wider arithmetic for the run that errors are measured against.
WIDER = {"cuda": torch.float32, "cpu": torch.float64}
# Beyond this a contender is wrong and its time means nothing. Rounding is a tenth of it and less;
# leaving small probabilities out of bfloat16 gradients costs up to 6 %, which is shown, not hidden.
ERROR_LIMITS = {torch.bfloat16: 0.1, torch.float32: 1e-3}


@dataclass(frozen=True)
class Outcome:
    """A value and its gradients, or None where none was wanted."""

    value: Tensor  # (N,) or scalar
    hidden_grad: Tensor | None  # (N, H)
    weight_grad: Tensor | None  # (V, H)


@dataclass(frozen=True)
class Errors:
    """Norm of the difference over the norm of the expected."""

    value: float
    hidden_grad: float | None
    weight_grad: float | None

    def verdict(self, dtype: torch.dtype) -> str:
        """What is wrong, or nothing; NaN is wrong."""
        limit = ERROR_LIMITS[dtype]
        named = {
            "value": self.value,
            "gradient of hidden": self.hidden_grad,
            "gradient of weight": self.weight_grad,
        }
        wrong = [
            f"relative error {error:.1g} in the {name}"
            for name, error in named.items()
            if error is not None and not error <= limit
        ]
        return ", ".join(wrong)


def scalar(value: Tensor, coefficients: Tensor) -> Tensor:
    """What is differentiated: a weighted sum of tokens, or the value itself where it is a scalar.

    The weights differ in sign, as those of chosen and rejected tokens do.
    """
    return value if value.ndim == 0 else torch.dot(value, coefficients.to(value.dtype))


def expected(inputs: InputSet, gives: Gives) -> Outcome:
    """Full logits and autograd in the wider dtype."""
    wide = WIDER[inputs.hidden.device.type]
    hidden = inputs.hidden.to(wide).requires_grad_()
    weight = inputs.weight.to(wide).requires_grad_()
    all_logps = torch.log_softmax(hidden @ weight.T, dim=-1)
    value = all_logps.gather(-1, inputs.labels.unsqueeze(-1)).squeeze(-1)
    if gives == "sum":
        value = -value.sum()
    elif gives == "pairs":
        value = tvkd(value.view(ROWS, -1).sum(-1), value.new_zeros(ROWS))
    gradients = torch.autograd.grad(scalar(value, inputs.coefficients), (hidden, weight))
    return Outcome(value.detach(), *gradients)


def outcome(contender: Contender, inputs: InputSet, mode: Mode) -> Outcome:
    """Run a contender once, backward too where `mode` wants gradients."""
    hidden = inputs.hidden.detach().requires_grad_(mode != "no-grad")
    weight = inputs.weight.detach().requires_grad_(mode == "trained")
    with torch.set_grad_enabled(mode != "no-grad"):
        value = contender.call(hidden, weight, inputs.labels)
    if mode != "no-grad":
        torch.autograd.backward(scalar(value, inputs.coefficients))
        if hidden.grad is None or (mode == "trained" and weight.grad is None):
            raise RuntimeError("it left out a gradient that was wanted")
    return Outcome(value.detach(), hidden.grad, weight.grad)


def errors(got: Outcome, wanted: Outcome) -> Errors:
    """Compare an outcome with the expected one, in the wider dtype."""
    return Errors(
        relative_error(got.value, wanted.value),
        _gradient_error(got.hidden_grad, wanted.hidden_grad),
        _gradient_error(got.weight_grad, wanted.weight_grad),
    )


def _gradient_error(got: Tensor | None, wanted: Tensor | None) -> float | None:
    return None if got is None or wanted is None else relative_error(got, wanted)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`, a tensor of the wider dtype."""
    difference = torch.linalg.vector_norm(got.to(wanted.dtype) - wanted)
    return float(difference / torch.linalg.vector_norm(wanted))
