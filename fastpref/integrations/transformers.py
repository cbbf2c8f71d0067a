"""What a head needs of a transformers model: its parameters, and the states that it reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops import linear_logsumexp

# Configurations name these numbers in many ways.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
# Most divide by `logits_scaling`; these multiply.
MULTIPLYING_MODELS = ("hyperclovax",)


class LMHead(NamedTuple):
    """A language-model head, as every function of fastpref takes it."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


def lm_head_of(model: Any) -> LMHead:
    r"""The head of a causal language model of transformers.

    .. math:: Q = \mathrm{softcap}(\mathrm{logit\_scale}\,(h W^\top + b))

    Args:
        model: A model with ``get_output_embeddings()`` and ``config``, bare or wrapped by PEFT.

    Returns:
        ``weight`` (V, H) and ``bias`` (V,) or None in the model's dtype, the model's own tensors;
        ``logit_scale`` and ``softcap``, plain numbers.

    Raises:
        ValueError: A model without a head of its own (an encoder-decoder, a headless model), or
            one whose head is quantised or not in memory.

    Example:
        >>> from transformers import CohereConfig, CohereForCausalLM
        >>> config = CohereConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...                       num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
        >>> head = lm_head_of(CohereForCausalLM(config))
        >>> head.weight.shape, head.bias, head.logit_scale, head.softcap
        (torch.Size([32, 16]), None, 0.0625, None)
    """
    module = head_module(model)
    weight = module.weight
    if not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2):
        raise ValueError(
            f"model: expected a head of floating-point numbers (V, H), got {type(module).__name__} "
            f"with {weight.dtype}; load the model with its lm_head left out of quantisation"
        )
    if weight.device.type == "meta":
        raise ValueError(
            "model: expected a head in memory, got one that is off-loaded (device 'meta'); "
            "give lm_head a device in device_map"
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(config, name, 1.0)
    for name in DIVISORS:
        number = _number(config, name, 1.0)
        scale *= number if config.model_type in MULTIPLYING_MODELS else 1.0 / number
    softcap = next((_number(config, name, 0.0) for name in SOFTCAPS if hasattr(config, name)), 0.0)
    return LMHead(weight, getattr(module, "bias", None), scale, softcap or None)


def head_states(model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Run a model up to its head.

    Args:
        model: A causal language model of transformers.
        **inputs: What its forward takes, ``input_ids`` (n, T) among it.

    Returns:
        (n, T, H) what the head reads, and (n, 1, V) the model's own logits of each first position:
        the others are never computed.
    """
    captured: list[Tensor] = []

    def keep_first(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(arguments[0])
        # The model goes on as it is used to, with next to nothing to do.
        return (arguments[0][:, :1], *arguments[1:])

    handle = head_module(model).register_forward_pre_hook(keep_first)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    if len(captured) != 1:
        raise ValueError(
            f"model: expected one call of its head in a forward pass, got {len(captured)} "
            f"({type(model).__name__})"
        )
    return captured[0], logits


@torch.no_grad()
def check_head(head: LMHead, states: Tensor, logits: Tensor) -> None:
    """Refuse a head that is not what the model computes, (n, T, H) -> (n, 1, V).

    Shifts, other scales and whatever else a model does to its logits show in their logsumexp; a
    tenth of a nat is beyond the rounding of any dtype.
    """
    first = states[:, :1].to(head.weight.device)
    ours = linear_logsumexp(
        first, head.weight, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
    )
    theirs = torch.logsumexp(logits.to(ours), dim=-1)
    tolerance = 0.1 + 8 * torch.finfo(logits.dtype).eps * theirs.abs()
    off = (ours - theirs).abs()[theirs.isfinite()]  # the rest is no fault of the head
    if not bool((off <= tolerance[theirs.isfinite()]).all()):
        raise ValueError(
            "model: expected logits softcap(logit_scale * (hidden @ weight.T + bias)) with "
            f"logit_scale={head.logit_scale:g} and softcap={head.softcap}, got logits whose "
            f"logsumexp is off by {float(off.max()):.3g}: "
            "this model does something else to them"
        )


def head_module(model: Any) -> torch.nn.Module:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("model: expected a decoder-only language model, got an encoder-decoder")
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if not isinstance(module, torch.nn.Module) or not hasattr(module, "weight"):
        raise ValueError(
            f"model: expected a language model with a head, got {type(model).__name__}, "
            "which has none"
        )
    return module


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)
