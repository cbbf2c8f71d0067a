"""What a head needs of a transformers model: its parameters, and the states that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from fastpref.checks import refuse
from fastpref.ops import Head, linear_logps, linear_logsumexp

# Configurations name these numbers in many ways.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
# Most divide by `logits_scaling`; these multiply.
MULTIPLYING_MODELS = ("hyperclovax",)
# MiniCPM3 divides what its head reads, MPT does nothing with its `logit_scale`.
PLAIN_MODELS = ("minicpm3", "mpt")
# Most models around a text model use its head as it is, even where the text model by itself scales
# or caps its logits (Gemma 3, Aya Vision and Cohere 2 Vision, Granite Speech); these do as it does.
FAITHFUL_WRAPPERS = (
    "cohere_compass gemma3n gemma4 gemma4_unified granite4_vision granite_docling "
    "hyperclovax_vision_v2 inkling2 mistral_large4 muse_glimmer muse_spark paligemma"
).split()
# Heads that `head_states` compared with their model's own logits.
_CHECKED: WeakSet[torch.nn.Module] = WeakSet()


def lm_head_of(model: Any) -> Head:
    r"""The head of a causal language model of transformers.

    .. math:: Q = \mathrm{softcap}(\mathrm{logit\_scale}\,(h W^\top + b))

    Args:
        model: A model with ``get_output_embeddings()`` and ``config``, bare or wrapped by PEFT.

    Returns:
        `fastpref.Head`: ``weight`` (V, H) and ``bias`` (V,) or None are the model's own tensors,
        in its dtype.

    Raises:
        ValueError: A model without a head of its own (an encoder-decoder, a headless model), or
            one whose head is quantised, not in memory, or the target of an adapter.

    Example:
        >>> from transformers import CohereConfig, CohereForCausalLM
        >>> config = CohereConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...                       num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
        >>> head = lm_head_of(CohereForCausalLM(config))
        >>> head.weight.shape, head.logit_scale, head.softcap
        (torch.Size([32, 16]), 0.0625, None)
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
    scale, softcap = _scale_and_softcap(_config_at(model, module))
    return Head(weight, getattr(module, "bias", None), scale, softcap)


def head_states(model: Any, **inputs: Any) -> Tensor:
    r"""What a model's head reads: hidden states after the final norm, without the logits.

    Differentiable, and the model runs as it is called: under PEFT its adapters take part. With
    `lm_head_of` it is what `fastpref.tvkd_loss` and the other functions of hidden states take. A
    model that DDP, FSDP or DeepSpeed wraps needs `add_fused_head` instead.

    Args:
        model: A causal language model of transformers, bare or wrapped by PEFT.
        **inputs: What its forward takes: ``input_ids`` (n, T) and, where they are padded,
            ``attention_mask`` (n, T). Models that learned a vector for every position want
            ``position_ids``, too, where the padding is on the left.

    Returns:
        (n, T, H) hidden states in the model's dtype. ``[:, :-1]`` predict ``input_ids[:, 1:]``.

    Raises:
        ValueError: As `lm_head_of`; a model that does something to its logits that its head does
            not say; adapters that put virtual tokens before the others.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> tokens = torch.randint(32, (2, 5))
        >>> head_states(model, input_ids=tokens).shape
        torch.Size([2, 5, 16])
    """
    for name in ("labels", "logits_to_keep"):
        if name in inputs:
            refuse(name, "nothing: take it out of the batch", "one")
    module = head_module(model)
    states, outputs = run_to_head(model, model, kept_rows=1, **inputs)
    tokens = inputs.get("input_ids")
    if tokens is not None and states.shape[:2] != tokens.shape:
        got = f"{tuple(states.shape[:2])}; adapters with virtual tokens add some"
        refuse("model", f"a hidden state for every token, {tuple(tokens.shape)}", got)
    if module not in _CHECKED:
        check_head(lm_head_of(model), states[:1], outputs.logits)
        _CHECKED.add(module)
    return states


def run_to_head(
    model: Any,
    run: Callable[..., Any],
    *inputs: Any,
    kept_rows: int | None = None,
    **named_inputs: Any,
) -> tuple[Tensor, Any]:
    """What a model's head reads (n, T, H) as ``run`` runs the model, and the outputs of that run.

    The outputs' logits are of the first position only, of all rows or of the first ``kept_rows``,
    and have no gradient in the states.
    """
    captured: list[Tensor] = []

    def keep_first(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(arguments[0])
        # The model goes on as it is used to, with next to nothing to do.
        return (arguments[0][:kept_rows, :1].detach(), *arguments[1:])

    handle = head_module(model).register_forward_pre_hook(keep_first)
    try:
        outputs = run(*inputs, **{**named_inputs, "use_cache": False})
    finally:
        handle.remove()
    if len(captured) != 1:
        raise ValueError(
            f"model: expected one call of its head in a forward pass, got {len(captured)} "
            f"({type(model).__name__})"
        )
    return captured[0], outputs


@torch.no_grad()
def check_head(head: Head, states: Tensor, logits: Tensor) -> None:
    """Refuse a head that is not what the model computes, (n, T, H) -> (n, 1, V).

    Other scales, shifts and whatever else a model does to its logits show in their logsumexp, what
    it does to few of them (tokens that it forbids) in the lowest or the highest; a tenth of a nat
    is beyond the rounding of any dtype.
    """
    first = states[:, :1].to(head.weight.device)
    expected = (*first.shape[:-1], head.weight.shape[0])
    if logits.shape != expected:
        raise ValueError(
            f"model: expected logits {tuple(expected)} of its head, got {tuple(logits.shape)}: "
            "this model does something else to them"
        )
    extremes = torch.cat([logits.argmin(-1), logits.argmax(-1)], dim=1)
    lse = linear_logsumexp(first, head)
    logps = linear_logps(first.expand(-1, 2, -1), head, extremes.to(first.device))
    ours = torch.cat([lse, logps + lse], dim=1)  # (n, 3)
    all_theirs = logits[:, 0].to(ours)
    their_lse = torch.logsumexp(all_theirs, dim=-1, keepdim=True)
    theirs = torch.cat([their_lse, all_theirs.gather(-1, extremes.to(ours.device))], dim=1)
    sound = their_lse.squeeze(-1).isfinite()  # the rest is no fault of the head
    epsilon = max(torch.finfo(dtype).eps for dtype in (states.dtype, logits.dtype))
    off = (ours - theirs).abs()[sound]
    if not bool((off <= 0.1 + 8 * epsilon * ours.abs()[sound]).all()):
        raise ValueError(
            "model: expected logits softcap(logit_scale * (hidden @ weight.T + bias)) with "
            f"logit_scale={head.logit_scale:g} and softcap={head.softcap}, got logits that are "
            f"off by {float(off.max()):.3g}: this model does something else to them"
        )


def head_module(model: Any) -> torch.nn.Module:
    """The module that computes a model's logits; refused is one whose weight does not say how."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("model: expected a decoder-only language model, got an encoder-decoder")
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if getter is None and isinstance(getattr(model, "module", None), torch.nn.Module):
        advice = "call add_fused_head before a model is wrapped, and give at_head to the wrapper"
        refuse("model", f"a model that nothing wraps ({advice})", type(model).__name__)
    if not isinstance(module, torch.nn.Module) or not hasattr(module, "weight"):
        raise ValueError(
            f"model: expected a language model with a head, got {type(model).__name__}, "
            "which has none"
        )
    if hasattr(module, "base_layer"):  # PEFT's name for what an adapter adds to
        raise ValueError(
            "model: expected a head without an adapter on it, got one of PEFT "
            f"({type(module).__module__}.{type(module).__name__}), which its weight leaves out; "
            "merge it (merge_and_unload), or take the head out of target_modules and train it "
            "whole with modules_to_save"
        )
    return module


def _config_at(model: Any, head: torch.nn.Module) -> Any:
    """The configuration of the innermost model around the head: its forward calls the head."""
    path = next(name for name, module in model.named_modules() if module is head)
    config, inner = model.config, model
    for name in path.split("."):
        inner = getattr(inner, name)
        config = getattr(inner, "config", config)
    return config


def _scale_and_softcap(config: Any) -> tuple[float, float | None]:
    text = config.get_text_config()
    wraps = text is not config
    if text.model_type in PLAIN_MODELS or (wraps and config.model_type not in FAITHFUL_WRAPPERS):
        return 1.0, None
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(text, name, 1.0)
    for name in DIVISORS:
        number = _number(text, name, 1.0)
        scale *= number if text.model_type in MULTIPLYING_MODELS else 1.0 / number
    softcap = next((_number(text, name, 0.0) for name in SOFTCAPS if hasattr(text, name)), 0.0)
    return scale, softcap or None


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)
