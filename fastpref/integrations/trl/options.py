"""Options of methods that are none of their loss: how what it reads comes about.

Each function's keywords are options, and its docstring holds their help texts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastpref.checks import Bounds, NonNegative, Positive, check_number, refuse
from fastpref.teacher.shaping import Form, Potential, Terminal, check_signal
from fastpref.teacher.shaping_columns import ShapingOptions

Kind = Literal[
    "jsd",
    "forward_kl",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "jeffreys",
]
TOKEN_PREFERENCE = "token_preference"  # among kinds, though it is no divergence
Tail = Literal["bucket", "drop", "renormalize"]
Probability = Annotated[float, Bounds(at_least=0, at_most=1)]
Count = Annotated[int, Bounds(at_least=1)]


def shaping_options(
    *,
    potential: Potential = "value",
    value_temperature: Positive = 1.0,
    gamma: NonNegative = 1.0,
    terminal: Terminal = "bootstrap",
    form: Form = "difference",
    value_beta: Positive = 0.1,
    precompute_shaping: bool = False,
    skip_bad_rows: bool = False,
) -> dict[str, Any]:
    """What `fastpref.teacher_shaping` takes, from the options of methods that read a shaping.

    Args:
        potential: What a state is worth to the teacher; implicit_reward reads teacher_ref_model.
        value_temperature: Temperature of the teacher's values, in logits.
        gamma: Discount of the teacher's values.
        terminal: The value after the last token: the teacher's own, or zero.
        form: The sum over a response; next_value is what the authors' code trains.
        value_beta: Scale of the implicit_reward, what the teacher was aligned with.
        precompute_shaping: Whether to compute the teacher's shaping of the whole dataset before
            training and free the teacher. It then reads its own tokens: any tokenizer will
            do. The result stays in output_dir and is used again.
        skip_bad_rows: Whether precompute_shaping leaves out rows that the teacher cannot read,
            of the training too, instead of refusing them.
    """
    check_signal(terminal, form, gamma)
    return ShapingOptions(potential, value_temperature, gamma, terminal, form, value_beta)._asdict()


def reference_options(*, reference_free: bool = True) -> bool:
    """Whether a method whose reference is optional does without one.

    Args:
        reference_free: Whether the loss does without a reference model. If False, a reference is
            used as in DPOTrainer: ref_model, or the checkpoint that the student was loaded from,
            or the student with its PEFT adapter off.
    """
    return reference_free


def divergence_options(
    *,
    divergence: Kind = "jsd",
    jsd_beta: Positive = 0.5,
    skew_alpha: Positive = 0.1,
    divergence_temperature: Positive = 1.0,
) -> dict[str, Any]:
    """What `fastpref.linear_divergence` takes, for methods that leave the divergence open.

    Args:
        divergence: The kind of divergence between teacher and student.
        jsd_beta: The teacher's weight in the mixture of the jsd, below 1.
        skew_alpha: The weight of what the skewed divergences are skewed towards, below 1.
        divergence_temperature: Divides the logits of both models, in the divergence only.
    """
    for name, value in (("jsd_beta", jsd_beta), ("skew_alpha", skew_alpha)):
        if value >= 1:
            refuse(name, "a number above 0 and below 1", value)
    return {
        "kind": divergence,
        "beta": jsd_beta,
        "alpha": skew_alpha,
        "temperature": divergence_temperature,
    }


def token_options(*, token_beta: Positive = 0.1) -> dict[str, Any]:
    """What `fastpref.linear_token_preference` takes.

    Args:
        token_beta: Scale of the log-ratios in the preference of each token.
    """
    return {"kind": TOKEN_PREFERENCE, "beta": token_beta}


def cache_options(*, topk_tail: Tail = "bucket") -> str:
    """The ``tail`` of `fastpref.linear_topk_divergence`, for methods that read a teacher's columns.

    Args:
        topk_tail: Where a dataset has the teacher's likeliest tokens only, what counts of all
            others: their sum, nothing, or nothing with the likeliest scaled to a sum of 1.
    """
    return topk_tail


def sampling_options(
    *,
    lmbda: Probability = 0.5,
    max_new_tokens: Count = 128,
    sampling_temperature: Positive = 0.9,
) -> dict[str, Any]:
    """What ``generate`` takes, for methods that train on the student's own responses.

    Args:
        lmbda: The share of steps whose responses the student writes; the others are the dataset's.
        max_new_tokens: The most tokens of a response that the student writes.
        sampling_temperature: Temperature of the student as it writes.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        refuse("max_new_tokens", "a whole number", repr(max_new_tokens))
    return {"max_new_tokens": max_new_tokens, "temperature": sampling_temperature}


def advantage_options(*, advantage_clip: list[float] | None = None) -> tuple[float, float] | None:
    """The ``clip`` of `fastpref.linear_divergence`.

    Args:
        advantage_clip: The least and the largest advantage of a token, in nats. The released code
            of ADPA trains with 0 and 1.
    """
    if advantage_clip is None:
        return None
    if not isinstance(advantage_clip, list | tuple) or len(advantage_clip) != 2:
        refuse("advantage_clip", "two numbers, the least and the largest", repr(advantage_clip))
    lowest, highest = (check_number("advantage_clip", one) for one in advantage_clip)
    if lowest > highest:
        refuse("advantage_clip", "the least before the largest", repr(advantage_clip))
    return lowest, highest
