"""The linear reward head of DRDO's students and oracles, and its file beside a model's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.checks import refuse
from fastpref.extras import require_extra
from fastpref.files import load_tensors, opened_tensors, tensors_as_bytes, written
from fastpref.models.fused_head import call_as
from fastpref.models.lm_head import head_module
from fastpref.rewards import sequence_rewards

NAME = "reward_head"
FILE = f"{NAME}.safetensors"
PARAMETER = f"{NAME}.weight"  # of the model, where that was saved whole
UNFINISHED = f"{NAME}.unfinished"  # while the model beside it may be older, or in pieces


def add_reward_head(model: Any) -> None:
    r"""Give a causal language model a linear reward head, ``model.reward_head``.

    .. math:: r(y) = w \cdot h_T

    DRDO (Direct Reward Distillation and policy-Optimization). A bias would cancel in every
    difference of rewards, so there is none. A model that has the head keeps it.

    Args:
        model: A causal language model of transformers, bare or wrapped by PEFT; changed in place.
            The head takes the dtype of what trains beside it (PEFT's adapters are float32 on a
            bfloat16 model), and the device of ``lm_head``.

    Raises:
        ValueError: A model without a head of its own.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> add_reward_head(model)
        >>> model.reward_head.weight.shape
        torch.Size([1, 16])
    """
    model = _bare(model)
    if has_reward_head(model):
        return
    lm_head: Any = head_module(model)  # ZeRO-3 leaves its weight without a shape
    trained = (parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    head = torch.nn.Linear(
        lm_head.in_features,
        1,
        bias=False,
        dtype=next(trained, lm_head.weight.dtype),
        device=lm_head.weight.device,
    )
    # As transformers starts the heads of sequence classifiers.
    torch.nn.init.normal_(head.weight, std=model.config.get_text_config().initializer_range)
    setattr(model, NAME, head)


def load_reward_head(model: Any, folder: str | Path) -> None:
    """Give a model the reward head that was saved with it.

    It is in a file of its own where a trainer saved the model, and among the model's weights where
    ``model.save_pretrained(folder)`` did, as after ``merge_and_unload()`` of PEFT's adapters.

    Args:
        model: As for `add_reward_head`.
        folder: Where the model was saved.

    Raises:
        ValueError: A folder without a reward head, with one that is damaged or for another hidden
            size, or whose saving was interrupted.
        ImportError: Without the extra "teacher".

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> def load_oracle(folder):
        ...     model = AutoModelForCausalLM.from_pretrained(folder)
        ...     load_reward_head(model, folder)
        ...     return model
    """
    require_extra("teacher", "load_reward_head", "safetensors")
    file = _file_with_head(Path(folder))
    if file is None:
        refuse(
            "folder",
            f"a folder with {FILE}, as OracleTrainer and DRDOTrainer save it",
            f"{str(folder)!r} without",
        )
    if file.name == FILE:
        (weight,) = load_tensors(file).values()
    else:
        with opened_tensors(file) as found:
            weight = found.get_tensor(PARAMETER)
    add_reward_head(model)
    head = reward_head_of(model)
    if weight.shape != head.weight.shape:
        refuse(str(file), f"shape {tuple(head.weight.shape)}", tuple(weight.shape))
    with torch.no_grad():
        head.weight.copy_(weight)


def _file_with_head(folder: Path) -> Path | None:
    """Which file of a folder has the reward head."""
    files = sorted(folder.glob("model*.safetensors"))
    for file in files:  # before a file of its own, which may be left of an older model
        with opened_tensors(file) as found:
            if PARAMETER in found.keys():
                return file
    if (folder / UNFINISHED).exists():
        expected = f"a folder that was saved to the end (save again, or delete {UNFINISHED})"
        refuse("folder", expected, folder / UNFINISHED)
    return folder / FILE if (folder / FILE).is_file() else None


def folder_has_reward_head(folder: str | Path) -> bool:
    """Whether there is a reward head; refused are folders that may have that of another model."""
    return _file_with_head(Path(folder)) is not None


@contextmanager
def saved_beside(head: dict[str, Tensor], folder: str | Path) -> Iterator[None]:
    """Write the reward head that `take_reward_head` took, while its model is written beside it.

    Stopped at any moment it leaves a head and a model of one state, or a file that says it has not.
    """
    require_extra("teacher", "saved_beside", "safetensors")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / UNFINISHED
    with written(unfinished) as temporary:
        temporary.write_bytes(tensors_as_bytes(head))
    yield
    os.replace(unfinished, folder / FILE)


def take_reward_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the reward head from a model's parameters, which are of a class that has none."""
    names = [name for name in state_dict if f".{name}".endswith(f".{PARAMETER}")]
    if len(names) != 1:
        refuse("model", f"one parameter {PARAMETER}", names)
    return {"weight": state_dict.pop(names[0])}


def has_reward_head(model: Any) -> bool:
    """Whether a model has been given a reward head."""
    return hasattr(_bare(model), NAME)


def reward_head_of(model: Any) -> Any:
    """The reward head of a model; refused is one that has none."""
    if not has_reward_head(model):
        refuse(
            "model",
            "a reward head (`load_reward_head` from the folder it was saved in, "
            "`add_reward_head` for a new one)",
            f"{type(_bare(model)).__name__} without",
        )
    return getattr(_bare(model), NAME)


def rewards_at_head(model: Any, states: Tensor, labels: Tensor) -> Tensor:
    """(2B,) rewards of responses from (2B, T + 1, H) states, (2B, T) labels."""
    head = reward_head_of(model)

    def rewards(states: Tensor) -> Tensor:
        return sequence_rewards(states, labels, head.weight)

    # Inside its own call, where FSDP and ZeRO-3 have its weight in memory.
    found: Tensor = call_as(head, rewards, states)
    return found


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
