"""Loading models, and recognising them again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fastpref.checks import check_choice
from fastpref.extras import require_extra
from fastpref.ops import Head

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_teacher(
    name: str, *, dtype: Dtype = "auto", device_map: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready to read.

    Args:
        name: A local folder, a ``.gguf`` file, or a name on the Hub; quantised and sharded
            checkpoints load as transformers loads them. Weights are read from safetensors files,
            never from pickles, and code that comes with a model is not run.
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
    require_extra("teacher", "fastpref.teacher.load_teacher", "accelerate", "transformers")
    return load_model("teacher", name, dtype=dtype, device_map=device_map)


# What loads a tokenizer as well as a model.
OF_BOTH = ("revision", "token", "trust_remote_code")


def load_model(
    argument: str,
    name: str,
    *,
    dtype: Dtype | torch.dtype = "auto",
    device_map: Any = None,
    **more: Any,
) -> tuple[Any, Any]:
    """`load_teacher` of a model that an argument names; ``more`` is for ``from_pretrained``."""
    if isinstance(dtype, torch.dtype):
        dtype = cast("Dtype", str(dtype).removeprefix("torch."))
    check_choice("dtype", dtype, get_args(Dtype))
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(argument, name, **{one: more[one] for one in OF_BOTH if one in more})
    device = this_process().device
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    placed = {} if device_map is None else {"device_map": device_map}
    options: Any = {"dtype": getattr(torch, dtype), "use_safetensors": True, **placed, **more}
    model: Any = _load(argument, AutoModelForCausalLM, name, **options)
    if device_map is None and model.device.type != device.type:
        model = model.to(device)
    return model.eval(), tokenizer


def load_tokenizer(argument: str, name: str, **more: Any) -> Any:
    """The tokenizer of a model that an argument names as `load_teacher` takes names."""
    from transformers import AutoTokenizer

    return _load(argument, AutoTokenizer, name, **more)


def load_student(name: str) -> Any:
    """A model of which the head alone is read: in float32, which has all its digits, on the CPU."""
    from transformers import AutoModelForCausalLM

    options: Any = {"dtype": torch.float32, "use_safetensors": True}
    return _load("student", AutoModelForCausalLM, name, **options)


def _load(argument: str, kind: Any, name: str, **options: Any) -> Any:
    """What transformers loads under a name; no code that comes with it, unless that is asked."""
    source = name
    if name.endswith(".gguf"):
        source, options["gguf_file"] = str(Path(name).parent), Path(name).name
    try:
        # Not said, it would ask at the terminal.
        return kind.from_pretrained(source, **{"trust_remote_code": False, **options})
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{argument}: expected a model folder, a .gguf file or a name on the Hub, "
            f"got {name!r} ({reason})"
        ) from error


def model_settings(model: Any) -> dict[str, str]:
    """What tells one teacher from another: its name, dtype and a digest of its parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            # A few numbers of each are enough to tell two trainings of one model apart.
            digest.update(_bytes_of_some(parameter, 64))
    return {
        "model": str(model.config.name_or_path),
        "model_type": str(model.config.model_type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_digest": digest.hexdigest()[:16],
    }


def head_digest(head: Head) -> str:
    """What tells one head from another, whatever dtype holds its numbers."""
    digest = hashlib.sha256(f"{tuple(head.weight.shape)} {head.logit_scale}".encode())
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            digest.update(_bytes_of_some(tensor, 4096, torch.float32))
    return digest.hexdigest()[:16]


def _bytes_of_some(tensor: Tensor, count: int, dtype: torch.dtype | None = None) -> bytes:
    """So many numbers of a tensor, evenly spread."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // count)][:count].contiguous().cpu()
    return bytes(sample.to(dtype or sample.dtype).view(torch.uint8).numpy().tobytes())


def this_process() -> Any:
    """Accelerate's view of this process: its device, its number, how many there are."""
    from accelerate import PartialState

    # Only with cpu=True does it join processes that run on CPUs.
    return PartialState(cpu=not torch.accelerator.is_available())
