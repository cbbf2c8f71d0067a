"""The float64 run that every peer's error is measured against."""

from pathlib import Path

import torch
from inputs import ROWS, load_batch
from peers import tvkd
from torch import Tensor


def reference_file(folder: Path, tokens: int) -> Path:
    """Where the float64 run of a token count is kept."""
    return folder / f"reference-{tokens}.pt"


def save_references(folder: Path, tokens: list[int], device: str) -> None:
    """Save loss, dL/dhidden (ROWS, T, H) and dL/dweight (V, H) for each token count.

    Each for alpha = 1 and for alpha = 0, which peers without shaping compute.
    """
    for count in tokens:
        torch.save(_reference(folder, count, torch.device(device)), reference_file(folder, count))


def _reference(
    folder: Path, tokens: int, device: torch.device
) -> dict[float, dict[str, float | Tensor]]:
    """Compute everything in float64 with full logits, one sequence at a time to fit in memory.

    The loss sees a sequence only through its summed log-probability, so the chain rule needs the
    gradients of those sums and one factor for each.
    """
    hidden, weight, labels, shaping = load_batch(folder / "batch.pt", tokens, device)
    hidden, weight = hidden.double(), weight.double().requires_grad_()
    sums, hidden_grads, weight_grads = zip(
        *(_row_sum(hidden[row], weight, labels[row]) for row in range(ROWS)), strict=True
    )
    result: dict[float, dict[str, float | Tensor]] = {}
    for alpha in (0.0, 1.0):
        logps = torch.stack(sums).requires_grad_()
        loss = tvkd(logps, shaping.double(), alpha)
        factors = torch.autograd.grad(loss, logps)[0]
        # Stored as float32 to save disk: its rounding, 3e-8, is far below every error measured.
        result[alpha] = {
            "loss": loss.item(),
            "hidden_grad": _weighted_stack(factors, hidden_grads).float(),
            "weight_grad": _weighted_sum(factors, weight_grads).float(),
        }
    return result


def _row_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed log-probability of one sequence and its gradients (T, H), (V, H)."""
    hidden = hidden.clone().requires_grad_()
    logps = torch.log_softmax(hidden @ weight.T, dim=-1)
    total = logps.gather(-1, labels.unsqueeze(-1)).sum()
    hidden_grad, weight_grad = torch.autograd.grad(total, (hidden, weight))
    return total.detach(), hidden_grad, weight_grad


def _weighted_stack(factors: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([factor * grad for factor, grad in zip(factors, grads, strict=True)])


def _weighted_sum(factors: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    total = torch.zeros_like(grads[0])
    for factor, grad in zip(factors, grads, strict=True):
        total += factor * grad
    return total
