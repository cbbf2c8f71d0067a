"""An oracle's rewards for a whole dataset: one number per response."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpref.extras import require_extra
from fastpref.models.reward_head import reward_head_of, rewards_at_head
from fastpref.ops import Head
from fastpref.teacher.precompute import MODULES, Job, check_run, precompute
from fastpref.teacher.store import noted

if TYPE_CHECKING:
    import datasets


def add_rewards(
    dataset: datasets.Dataset | Iterable[Mapping[str, Any]] | str | Path,
    oracle: Any,
    tokenizer: Any,
    output: str | Path,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    skip_bad_rows: bool = False,
) -> datasets.Dataset:
    r"""Add an oracle's rewards to every row of a preference dataset.

    .. math:: \hat r(y) = w \cdot h_T

    DRDO (Direct Reward Distillation and policy-Optimization). The reward belongs to the *oracle's*
    tokens: the student may have another tokenizer and template. A precompute that was killed goes
    on where it stopped, and under ``torchrun`` or ``accelerate launch`` the processes share the
    batches, as in `fastpref.teacher.add_shaping`.

    Args:
        dataset: Preference pairs, as `fastpref.teacher.add_shaping` takes them.
        oracle: A causal language model of transformers with a reward head, on its device:
            `fastpref.models.load_reward_head` gives it the one that ``OracleTrainer`` saved. It is
            left in evaluation mode.
        tokenizer: The oracle's own tokenizer, whose chat template is applied as TRL's
            ``DPOTrainer`` does.
        output: The Parquet file to write. ``<output>.partial`` beside it keeps what is done.
        max_length: Cut sequences after so many of the oracle's tokens, as TRL's ``max_length``.
        batch_size: Pairs per batch. Another batch size may round other last digits.
        skip_bad_rows: Leave rows out that cannot be used, instead of refusing them all.

    Returns:
        The dataset with columns ``chosen_reward`` and ``rejected_reward``, float32, in the unit
        that the oracle learned, of which DRDO reads differences.

    Raises:
        ValueError: Rows that cannot be used, by their index; a model without a reward head; an
            output that was made with other settings; a setting out of range.
        ImportError: Without the extra "teacher".

    Example:
        >>> from fastpref.models import load_reward_head
        >>> from fastpref.teacher import add_rewards, load_teacher
        >>> def precompute(folder, pairs):
        ...     oracle, tokenizer = load_teacher(folder)
        ...     load_reward_head(oracle, folder)
        ...     return add_rewards(pairs, oracle, tokenizer, "pairs-with-rewards.parquet")
    """
    output = Path(output)
    check_run(output, max_length, batch_size)
    reward_head_of(oracle)
    require_extra("teacher", "fastpref.teacher.add_rewards", *MODULES)

    @torch.no_grad()
    def of_batch(states: Tensor, _: Head, labels: Tensor) -> dict[str, Tensor]:
        return {"reward": rewards_at_head(oracle, states, labels)}

    features = {"reward": noted("float32", max_length=max_length)}
    job = Job("oracle rewards", of_batch, features, {}, finite="reward")
    return precompute(
        job, dataset, oracle, tokenizer, output,
        max_length=max_length, batch_size=batch_size, skip_bad_rows=skip_bad_rows,
    )  # fmt: skip
