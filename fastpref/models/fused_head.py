"""Losses computed where a model's head is: inside its forward pass, instead of logits.

Wrappers expect that: DDP reduces the gradients of what its forward used, FSDP2 and DeepSpeed's
ZeRO-3 have a module's parameters in memory while it runs, and no longer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from fastpref.models.lm_head import (
    check_head,
    head_module,
    lm_head_of,
    run_to_head,
)
from fastpref.ops import Head

AtHead = Callable[[Tensor, Head], dict[str, Tensor]]


def add_fused_head(model: Any) -> None:
    """Teach a causal language model to run a function of yours in place of its head.

    From then on ``model(..., at_head=function)`` runs the model up to its head and returns
    ``function(states, head)``, with the model's ``aux_loss`` beside it where it has one (mixtures
    of experts that are asked for their router's logits). Without ``at_head`` nothing changes. Call
    it before DDP, FSDP or DeepSpeed wrap the model, and pass ``at_head`` to the wrapped one.

    ``function`` takes (n, T, H) states, on the head's device, and a `Head`; it returns a
    dictionary of tensors. What it needs beside, labels for instance, it brings along. A model that
    has been taught is left as it is.

    Args:
        model: A causal language model of transformers, bare or wrapped by PEFT; changed in place.

    Raises:
        ValueError: As `lm_head_of`; and, when it first runs, a model that does something to its
            logits that its head does not say.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import fastpref
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> add_fused_head(model)
        >>> tokens = torch.randint(32, (2, 5))
        >>> def logps(states, head):
        ...     found = fastpref.linear_logps(states[:, :-1], head, tokens[:, 1:])
        ...     return {"logps": found}
        >>> model(input_ids=tokens, at_head=logps)["logps"].shape
        torch.Size([2, 4])
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if _runs_at_head(model.forward):
        return
    head_module(model)  # refuses models without a head now, not in the first step
    # Somebody else's forward, accelerate's for example, stays below ours. The class's own is looked
    # up in each call: a copy of the model must not run the layers of the first.
    own = model.__dict__.get("forward")
    checked = False

    # The signature stays: trainers read which inputs a model takes from it, and `generate` too.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *inputs: Any, at_head: AtHead | None = None, **named_inputs: Any) -> Any:
        nonlocal checked
        run = own or MethodType(type(self).forward, self)
        if at_head is None:
            return run(*inputs, **named_inputs)
        # One row's logits tell whether the head is all there is to them.
        states, outputs = run_to_head(self, run, *inputs, kept_rows=1, **named_inputs)

        def instead(states: Tensor) -> dict[str, Tensor]:
            nonlocal checked
            head = lm_head_of(self)
            states = states.to(head.weight.device)
            if not checked:
                check_head(head, states[:1], outputs.logits)
                checked = True
            return at_head(states, head)

        results = call_as(head_module(self), instead, states)
        aux_loss = getattr(outputs, "aux_loss", None)
        return results if aux_loss is None else {**results, "aux_loss": aux_loss}

    forward.runs_at_head = True  # type: ignore[attr-defined]  # a function's own attribute
    model.forward = MethodType(forward, model)


def _runs_at_head(forward: Any) -> bool:
    """Whether `add_fused_head` made this function, or one that others, mixed precision, wrapped."""
    found = inspect.unwrap(forward, stop=lambda inner: hasattr(inner, "runs_at_head"))
    return hasattr(found, "runs_at_head")


def call_as(module: torch.nn.Module, forward: Callable[[Tensor], Any], states: Tensor) -> Any:
    """Call a module, its hooks around it, with another forward."""
    # torch.compile follows no forward that changes from call to call. As a decorator this would
    # import the compiler, which needs more than torch, as soon as fastpref is imported.
    return torch.compiler.disable(_call_as)(module, forward, states)  # type: ignore[no-untyped-call]  # torch's own


def _call_as(module: torch.nn.Module, forward: Callable[[Tensor], Any], states: Tensor) -> Any:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(states)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
