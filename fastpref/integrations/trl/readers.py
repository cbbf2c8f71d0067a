"""Teachers and oracles that read the student's batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import get_config_model_id

from fastpref.checks import refuse
from fastpref.data.tokens import check_same_vocabulary
from fastpref.integrations.trl.passes import BOTH, Reading, Sides
from fastpref.models.fused_head import add_fused_head
from fastpref.ops import Head
from fastpref.teacher.model import load_model

OfStates = Callable[[Tensor, Head, Tensor], Tensor]  # states, head, labels -> (2B, ...)


@dataclass
class Reader:
    """A model that reads the student's batches, once each, whatever losses want of it."""

    argument: str
    model: Any
    tokenizer: Any
    signals: dict[str, OfStates] = field(default_factory=dict)  # by a loss's input, or its part
    sides: Sides | None = None  # of whose responses the states are kept; None for no states
    spread: bool = False  # over processes, by FSDP or DeepSpeed

    def join(self, trainer: Any) -> None:
        """Check that it reads the student's tokens; place it as TRL places a reference."""
        advice = " (precompute_shaping=True or `fastpref values` let a teacher read its own)"
        shapes = any(name.startswith("shaping") for name in self.signals)
        when = " in every step" + (advice if shapes else "")
        check_same_vocabulary(self.argument, self.tokenizer, trainer._tokenizer, when=when)
        self.model.eval().requires_grad_(False)
        add_fused_head(self.model)
        self.spread = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        if trainer.is_deepspeed_enabled:
            self.model = prepare_deepspeed(self.model, trainer.accelerator)
        elif trainer.is_fsdp_enabled:
            self.model = prepare_fsdp(self.model, trainer.accelerator)
        else:
            self.model = trainer.accelerator.prepare_model(self.model, evaluation_mode=True)

    @torch.no_grad()
    def __call__(
        self, inputs: dict[str, Tensor], labels: Tensor, pairs: int
    ) -> tuple[dict[str, Tensor], Reading | None]:
        """Its signals of a batch of so many pairs, (2B, ...), and the states that are kept."""
        sides = self.sides if self.sides and not self.signals else BOTH
        kept: list[Reading] = []

        def at_head(states: Tensor, head: Head) -> dict[str, Tensor]:
            if self.sides:
                kept.append(kept_reading(states, head, sides, self.spread))
            there = labels.to(states.device)
            return {name: of(states, head, there) for name, of in self.signals.items()}

        rows = sides.rows(pairs)
        tokens = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
        found = self.model(**tokens, at_head=at_head)
        return {name: found[name] for name in self.signals}, kept[0] if kept else None


def kept_reading(states: Tensor, head: Head, sides: Sides, spread: bool) -> Reading:
    """States and head for later, when the model does not run any more."""
    if spread:  # then its head is in memory while it runs, and no longer
        bias = None if head.bias is None else head.bias.detach().clone()
        head = head._replace(weight=head.weight.detach().clone(), bias=bias)
    return Reading(states, head, sides)


def load_frozen(argument: str, model: Any, tokenizer: Any, **init: Any) -> tuple[Any, Any]:
    """A model that is given or named, and its tokenizer, found where the model came from.

    ``init`` is for ``from_pretrained``.
    """
    if isinstance(model, str):
        model, found = load_model(argument, model, **init)
        return model, tokenizer or found
    if init:
        refuse("teacher_model_init_kwargs", "None, since the teacher is loaded already", init)
    model.eval()
    if tokenizer is None:
        source = get_config_model_id(model.config)
        try:
            # Not said, it would ask at the terminal.
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{argument.split('_')[0]}_processing_class: expected the tokenizer of "
                f"{argument}, got None, and none is found at {source!r}"
            ) from error
    return model, tokenizer
