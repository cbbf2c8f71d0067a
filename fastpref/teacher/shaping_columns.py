"""The teacher's shaping for a whole dataset: one number per response."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from fastpref.checks import check_choice, check_number, refuse
from fastpref.data.tokens import IGNORE_INDEX, check_same_vocabulary
from fastpref.extras import require_extra
from fastpref.ops import Head
from fastpref.sequences import labels_of_states
from fastpref.teacher.implicit import implicit_rewards
from fastpref.teacher.model import model_settings
from fastpref.teacher.precompute import COUNTS, MODULES, Job, check_run, load, precompute
from fastpref.teacher.shaping import (
    Form,
    Potential,
    Terminal,
    check_signal,
    shaping_from_values,
    state_potentials,
    teacher_shaping,
)
from fastpref.teacher.store import noted

if TYPE_CHECKING:
    import datasets


class ShapingOptions(NamedTuple):
    """What the shaping of a response is; see `fastpref.teacher_shaping`."""

    potential: Potential = "value"
    temperature: float = 1.0
    gamma: float = 1.0
    terminal: Terminal = "bootstrap"
    form: Form = "difference"
    beta: float = 0.1


def add_shaping(
    dataset: datasets.Dataset | Iterable[Mapping[str, Any]] | str | Path,
    model: Any,
    tokenizer: Any,
    output: str | Path,
    *,
    potential: Potential = "value",
    temperature: float = 1.0,
    gamma: float = 1.0,
    terminal: Terminal = "bootstrap",
    form: Form = "difference",
    reference: Any = None,
    reference_tokenizer: Any = None,
    beta: float = 0.1,
    per_token: bool = False,
    max_length: int | None = None,
    batch_size: int = 8,
    skip_bad_rows: bool = False,
) -> datasets.Dataset:
    r"""Add a teacher's shaping to every row of a preference dataset.

    .. math:: \Psi(y) = \sum_t \gamma \phi(s_{t+1}) - \phi(s_t)

    TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025). Telescoping makes it one number
    per response. It belongs to the *teacher's* tokens: the student may have another tokenizer and
    template. A precompute that was killed goes on where it stopped and ends in the same numbers.
    Under ``torchrun`` or ``accelerate launch`` the processes share the batches.

    Args:
        dataset: Preference pairs in TRL's standard or conversational format, with a ``prompt``
            or with one that ``chosen`` and ``rejected`` repeat: a dataset, an iterable of rows, a
            JSON-lines or Parquet file, or a name on the Hub, whose split "train" is read.
        model: The teacher, a causal language model of transformers, on its device; left in
            evaluation mode.
        tokenizer: The teacher's own tokenizer, whose chat template is applied as TRL's
            ``DPOTrainer`` does.
        output: The Parquet file to write. ``<output>.partial`` beside it keeps what is done.
        potential: As in `fastpref.teacher_shaping`, and so the next four.
        temperature: In the unit of the logits.
        gamma: Discount.
        terminal: The potential after the last token.
        form: Of the sum.
        reference: With ``potential="implicit_reward"``: the teacher before it was aligned, a causal
            language model; left in evaluation mode. It reads the teacher's tokens.
        reference_tokenizer: Its tokenizer, whose vocabulary has to be the teacher's; None where it
            is ``tokenizer``.
        beta: Of ``"implicit_reward"``: its scale, what the teacher was aligned with.
        per_token: Also add the potential of every state of a response.
        max_length: Cut sequences after so many of the teacher's tokens, as TRL's ``max_length``.
        batch_size: Pairs per batch. Another batch size may round other last digits.
        skip_bad_rows: Leave rows out that cannot be used, instead of refusing them all.

    Returns:
        The dataset with columns ``chosen_shaping`` and ``rejected_shaping``, float32 in the unit of
        the potential, and with ``per_token`` ``chosen_values`` and ``rejected_values``, lists of
        (T + 1) float32.

    Raises:
        ValueError: Rows that cannot be used, by their index; a model whose head fastpref does not
            know; a reference that is missing, that the potential has not, that is the teacher or
            has another vocabulary; an output that was made with other settings; a setting out of
            range.
        ImportError: Without the extra "teacher".

    Example:
        >>> from fastpref.teacher import add_shaping, load_teacher
        >>> def precompute(name, pairs):
        ...     model, tokenizer = load_teacher(name)
        ...     return add_shaping(pairs, model, tokenizer, "pairs-with-values.parquet")
    """
    options = ShapingOptions(potential, temperature, gamma, terminal, form, beta)
    output = Path(output)
    check_run(output, max_length, batch_size)
    check_shaping_options(options)
    check_other_model(options, model, reference)
    require_extra("teacher", "fastpref.teacher.add_shaping", *MODULES)
    import datasets

    if reference_tokenizer is not None:
        check_same_vocabulary(
            "reference_tokenizer", reference_tokenizer, tokenizer, whose="teacher"
        )
    features = {"shaping": noted("float32", max_length=max_length)}
    if per_token:
        features["values"] = datasets.List(datasets.Value("float32"))

    def of_batch(*of_models: Any) -> dict[str, Tensor]:
        return shape_batch(*of_models, options=options, per_token=per_token)

    settings = {**options._asdict(), "per_token": per_token}
    if reference is None:
        del settings["beta"]
    else:
        of_reference = model_settings(reference)
        settings |= {f"reference_{name}": value for name, value in of_reference.items()}
    job = Job("teacher values", of_batch, features, settings, finite="shaping", reference=reference)
    return precompute(
        job, dataset, model, tokenizer, output,
        max_length=max_length, batch_size=batch_size, skip_bad_rows=skip_bad_rows,
    )  # fmt: skip


def load_shaping(file: str | Path, **expected: Any) -> datasets.Dataset:
    """Load a dataset that `add_shaping` or ``fastpref values`` wrote, and hold it to its settings.

    Args:
        file: The Parquet file.
        **expected: Settings that it must have been made with: ``model``, ``tokenizer``,
            ``chat_template``, ``dtype``, ``potential``, ``temperature``, ``gamma``, ``terminal``,
            ``form``, ``reference_model``, ``beta``, ``max_length`` and the others in the file.

    Returns:
        The dataset; see `add_shaping`.

    Raises:
        ValueError: A file that was made with other settings, not by fastpref, or that is damaged.
        ImportError: Without the extra "teacher".

    Example:
        >>> def load():
        ...     return load_shaping("pairs-with-values.parquet", potential="value", gamma=1.0)
    """
    require_extra("teacher", "fastpref.teacher.load_shaping", "datasets")
    return load(Path(file), expected)


def check_shaping_options(options: ShapingOptions) -> None:
    """Refuse what would fail only after the model has been loaded."""
    check_choice("potential", options.potential, get_args(Potential))
    check_choice("terminal", options.terminal, get_args(Terminal))
    check_choice("form", options.form, get_args(Form))
    check_number("temperature", options.temperature, above=0)
    check_number("gamma", options.gamma, at_least=0)
    check_number("beta", options.beta, above=0)
    check_signal(options.terminal, options.form, options.gamma)


def check_other_model(options: ShapingOptions, model: object, reference: object) -> None:
    """Refuse a reference, or its name, that is missing, not wanted, or the teacher itself."""
    wanted = options.potential == "implicit_reward"
    if wanted and reference is None:
        expected = "the teacher before it was aligned, with potential 'implicit_reward'"
        refuse("reference", expected, None)
    if not wanted and reference is not None:
        refuse("reference", f"None with potential {options.potential!r}", "a model")
    if wanted and reference == model:
        expected = "another model than the teacher, whose implicit reward would be 0"
        refuse("reference", expected, "the teacher")


@torch.no_grad()
def shape_batch(
    states: Tensor,  # (2B, T + 1, H)
    head: Head,
    labels: Tensor,  # (2B, T)
    reference_states: Tensor | None = None,  # (2B, T + 1, H_r)
    reference_head: Head | None = None,
    *,
    options: ShapingOptions,
    per_token: bool,
) -> dict[str, Tensor]:
    """``shaping`` (2B,), and with ``per_token`` ``values`` (n,) of all responses' states, flat."""
    if not per_token:
        shaping = teacher_shaping(
            states,
            head,
            labels,
            reference_hidden=reference_states,
            reference_head=reference_head,
            **options._asdict(),
        )
        return {"shaping": shaping}
    # A state belongs to a response where it predicts a token of it, or follows the last one.
    targets = labels_of_states(labels, None, IGNORE_INDEX)
    predicts = targets != IGNORE_INDEX
    in_response = predicts | predicts.roll(1, dims=1)
    if reference_states is not None and reference_head is not None:
        models = states, head, reference_states, reference_head
        values = implicit_rewards(
            *models, targets, beta=options.beta, temperature=options.temperature
        )
    else:
        values = state_potentials(
            states,
            head,
            torch.where(in_response, 0, IGNORE_INDEX),
            potential=options.potential,
            temperature=options.temperature,
            ignore_index=IGNORE_INDEX,
        )
    shaping = shaping_from_values(
        values, labels, gamma=options.gamma, terminal=options.terminal, form=options.form
    )
    return {"shaping": shaping, "values": values[in_response], COUNTS: in_response.sum(1)}
