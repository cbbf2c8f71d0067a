"""Teachers and oracles: loading them, and telling whose tokens they read."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer
from trl.trainer.utils import get_config_model_id

from fastpref.checks import refuse
from fastpref.data.tokens import tokenizer_settings
from fastpref.teacher import load_teacher


def load_frozen(argument: str, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A model that is given or named, and its tokenizer, found where the model came from."""
    if isinstance(model, str):
        model, found = load_teacher(model)
        return model, tokenizer or found
    model.eval()
    if tokenizer is None:
        source = get_config_model_id(model.config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{argument.removesuffix('_model')}_processing_class: expected the tokenizer of "
                f"{argument}, got None, and none is found at {source!r}"
            ) from error
    return model, tokenizer


def require_same_tokens(argument: str, theirs: Any, student: Any) -> None:
    """Refuse a model that would be fed the student's token numbers and read other words."""
    key = "tokenizer_digest"
    if tokenizer_settings(theirs)[key] != tokenizer_settings(student)[key]:
        refuse(
            argument,
            "the student's vocabulary, since it reads the student's tokens in every step "
            "(precompute_shaping=True or `fastpref values` let a teacher read its own)",
            f"another one (tokenizers {theirs.name_or_path!r} and {student.name_or_path!r})",
        )
