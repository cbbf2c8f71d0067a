"""What TRL's trainers make of log-probabilities: their own code, around a model that has them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def trainer_of(name: str, logps: dict[int, dict[str, Tensor]], **settings: Any) -> Any:
    """A trainer of TRL whose model gives ``logps`` and statistics (S, T), by its inputs' length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported packages, none of ours
        trl = pytest.importorskip("trl", "1.16", reason="trl >= 1.16 is not installed")
    cls = getattr(trl, name)
    found = cls.__new__(cls)

    def model(*, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        given = logps[input_ids.shape[1]]
        zeros = torch.zeros_like(given["log_probs"])
        nothing = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return SimpleNamespace(**nothing | given)

    model.training = False
    alone = SimpleNamespace(
        device="cpu", gather=lambda one: one, gather_for_metrics=lambda one: one
    )
    settings = {"beta": 0.1, "aux_loss_enabled": False, "precompute_ref_logps": True} | settings
    vars(found).update(
        model=model, accelerator=alone, _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0, **settings,
    )  # fmt: skip
    return found


def batch_of(mask: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """What TRL's collators give of responses: the mask (S, T) of tokens that have labels."""
    first = torch.zeros(len(mask), 1, dtype=torch.int64)
    mask = torch.cat([first, mask.long()], 1)
    names = ("input_ids", "attention_mask", "completion_mask")
    values = (torch.zeros_like(mask), torch.ones_like(mask), mask)
    return {prefix + name: one for name, one in zip(names, values, strict=True)}


def dpo_loss(
    logps: Tensor,  # (2B, T)
    mask: Tensor,  # (2B, T) bool
    ref_logps: Tensor,  # (2B,)
    loss_type: str,
    *,
    beta: float,
    log_sum_sq_probs: Tensor | None = None,  # (2B, T), where pairs are to be weighted
) -> Tensor:
    """`DPOTrainer`'s loss of a type."""
    given = {"log_probs": logps * mask}
    if log_sum_sq_probs is not None:
        given["log_sum_sq_probs"] = log_sum_sq_probs
    found = trainer_of(
        "DPOTrainer", {mask.shape[1] + 1: given}, beta=beta, ld_alpha=None, label_smoothing=0.0,
        loss_types=[loss_type], loss_weights=[1.0], f_divergence_type="reverse_kl",
        use_weighting=log_sum_sq_probs is not None,
    )  # fmt: skip
    chosen, rejected = ref_logps.chunk(2)
    references = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss: Tensor = found._compute_loss(found.model, batch_of(mask) | references, False)
    return loss


def kto_loss(
    logps: Tensor,  # (S, T)
    mask: Tensor,  # (S, T) bool
    ref_logps: Tensor,  # (S,)
    desirable: Tensor,  # (S,) bool
    kl_logps: Tensor,  # (S, T'), T' another than T
    kl_mask: Tensor,  # (S, T') bool
    ref_kl_logps: Tensor,  # (S,)
    **settings: float,
) -> Tensor:
    """`KTOTrainer`'s loss."""
    given = {
        mask.shape[1] + 1: {"log_probs": logps * mask},
        kl_mask.shape[1] + 1: {"log_probs": kl_logps * kl_mask},
    }
    found = trainer_of("KTOTrainer", given, loss_type="kto", calculate_KL=True, **settings)
    batch = batch_of(mask) | batch_of(kl_mask, "KL_")
    batch |= {"label": desirable, "ref_logps": ref_logps, "ref_KL_logps": ref_kl_logps}
    loss: Tensor = found._compute_loss(found.model, batch, False)
    return loss
