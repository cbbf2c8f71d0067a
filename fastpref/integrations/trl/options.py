"""Arguments of TRL that a loss has no use for: refused, not dropped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from fastpref.checks import refuse

# What makes DPO's loss another one. `label_smoothing_factor` is that of transformers' own Trainer.
OF_OTHER_LOSSES = (
    "loss_type",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
    "label_smoothing_factor",
)
OF_REFERENCE = (
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)


def refuse_options(args: Any, names: Iterable[str], reason: str) -> None:
    """Refuse options that were set to something else than their default."""
    defaults = {field.name: field for field in fields(args)}
    for name in names:
        field = defaults[name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(args, name) != default:
            refuse(name, f"{default!r}, since {reason}", repr(getattr(args, name)))


def refuse_adapters(model: Any, peft_config: Any) -> None:
    """Refuse adapters that put virtual tokens before a prompt, which have no labels."""
    configs = [] if peft_config is None else [peft_config]
    configs += list(getattr(model, "peft_config", {}).values())
    for config in configs:
        if getattr(config, "is_prompt_learning", False):
            refuse(
                "peft_config",
                "an adapter of the model's layers, LoRA for example",
                f"{type(config).__name__}, whose virtual tokens shift the response",
            )
