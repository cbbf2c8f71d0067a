"""Loading a teacher, and recognising it again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fastpref.checks import check_choice
from fastpref.extras import require_extra

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_teacher(
    name: str, *, dtype: Dtype = "auto", device_map: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready to read.

    Args:
        name: A local folder, a ``.gguf`` file, or a name on the Hub; quantised and sharded
            checkpoints load as transformers loads them.
        dtype: ``"auto"`` is bfloat16 on an accelerator and float32 on a CPU; or ``"float32"``,
            ``"bfloat16"``, ``"float16"``.
        device_map: As in transformers, for example ``"auto"`` to spread a model over several
            devices; None puts it on this process's device.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ValueError: A dtype that is not one of these, or nothing to load under this name.
        ImportError: Without the extra "teacher".

    Example:
        >>> def large_teacher():
        ...     return load_teacher("meta-llama/Llama-3.1-8B-Instruct", device_map="auto")
    """
    check_choice("dtype", dtype, get_args(Dtype))
    require_extra("teacher", "fastpref.teacher.load_teacher", "accelerate", "transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = this_process().device
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    options: dict[str, Any] = {}
    source = name
    if name.endswith(".gguf"):
        source, options["gguf_file"] = str(Path(name).parent), Path(name).name
    placed = {} if device_map is None else {"device_map": device_map}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), **placed, **options
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"teacher: expected a model folder, a .gguf file or a name on the Hub, got {name!r} "
            f"({reason})"
        ) from error
    if device_map is None and model.device.type != device.type:
        model = model.to(device)
    return model.eval(), tokenizer


def model_settings(model: Any) -> dict[str, str]:
    """What tells one teacher from another: its name, dtype and a digest of its parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            # A few numbers of each are enough to tell two trainings of one model apart.
            sample = flat[:: max(1, flat.numel() // 64)][:64].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return {
        "model": str(model.config.name_or_path),
        "model_type": str(model.config.model_type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_digest": digest.hexdigest()[:16],
    }


def this_process() -> Any:
    """Accelerate's view of this process: its device, its number, how many there are."""
    from accelerate import PartialState

    # Only with cpu=True does it join processes that run on CPUs.
    return PartialState(cpu=not torch.accelerator.is_available())
