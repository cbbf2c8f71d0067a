"""The command ``fastpref``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

from fastpref import __version__
from fastpref.checks import refuse
from fastpref.data import read_rows
from fastpref.extras import require_extra
from fastpref.inspection import inspect_teacher, inspect_values, write_page
from fastpref.inspection.inspecting import check_inspection
from fastpref.inspection.page import check_page
from fastpref.models import load_reward_head
from fastpref.teacher import add_kd_cache, add_rewards, add_shaping, load_teacher
from fastpref.teacher.kd_cache import check_kd_options
from fastpref.teacher.model import Dtype, load_model, load_student, load_tokenizer
from fastpref.teacher.precompute import check_run
from fastpref.teacher.shaping import Form, Potential, Terminal
from fastpref.teacher.shaping_columns import (
    ShapingOptions,
    check_other_model,
    check_shaping_options,
)
from fastpref.teacher.store import read_settings

try:
    extra = "trl" if sys.argv[1:2] == ["train"] else "teacher"
    require_extra(extra, "the command", "accelerate", "datasets", "transformers", "typer")
    import typer

    from fastpref.screen import be_quiet, precomputing, print_verdicts
except ImportError as error:
    sys.exit(f"fastpref: {error}")

Teacher = Annotated[
    str, typer.Option(help="A folder, a .gguf file, or a name on the Hugging Face Hub.")
]
Pairs = Annotated[
    str,
    typer.Option(
        help="Preference pairs (chosen and rejected, with or without prompt; text or chat "
        "messages): a .jsonl, .csv or .parquet file, a saved dataset, or a name on the Hub."
    ),
]
Output = Annotated[Path, typer.Option(help="The .parquet file to write.")]
Split = Annotated[str, typer.Option(help="Which split of a saved dataset, or of one on the Hub.")]
BatchSize = Annotated[int, typer.Option(help="Pairs per batch.")]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and say which."),
]
TeachersDtype = Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")]
DeviceMap = Annotated[
    str | None, typer.Option(help='"auto" spreads a large teacher over all GPUs.')
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def fastpref(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Fused losses for preference distillation, and what can be computed before training."""


@app.command()
def values(
    teacher: Teacher,
    dataset: Pairs,
    output: Output,
    split: Split = "train",
    potential: Annotated[
        Potential, typer.Option(help="What a state is worth; value is the paper's choice.")
    ] = "value",
    temperature: Annotated[float, typer.Option(help="Temperature of the teacher's value.")] = 1.0,
    gamma: Annotated[
        float, typer.Option(help="Discount; with 1 the head is read twice per response.")
    ] = 1.0,
    terminal: Annotated[Terminal, typer.Option(help="Value after the last token.")] = "bootstrap",
    form: Annotated[Form, typer.Option(help="next_value is what the authors' code trains.")] = (
        "difference"
    ),
    reference: Annotated[
        str | None,
        typer.Option(
            help="For the implicit_reward: the teacher before it was aligned, named like the "
            "teacher."
        ),
    ] = None,
    beta: Annotated[
        float, typer.Option(help="Scale of the implicit_reward: what the teacher was aligned with.")
    ] = 0.1,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also write the value of every state.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Cut sequences after so many of the teacher's tokens.")
    ] = None,
    batch_size: BatchSize = 8,
    skip_bad_rows: SkipBadRows = False,
    dtype: TeachersDtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Add a teacher's values to a preference dataset, ready for TVKD.

    Writes the dataset with two columns more, chosen_shaping and rejected_shaping: one number per
    response, made with the teacher's own tokenizer and chat template, whatever the student's are.

    Stopped at any moment and started again with the same arguments, it goes on where it was. On
    several GPUs: torchrun --nproc-per-node 4 -m fastpref values ...
    """
    options = ShapingOptions(potential, temperature, gamma, terminal, form, beta)
    check_run(output, max_length, batch_size)
    check_shaping_options(options)
    check_other_model(options, teacher, reference)
    rows = read_rows(dataset, split)
    loading: Any = {"dtype": dtype, "device_map": device_map}
    with precomputing(output) as report:
        model, tokenizer = load_teacher(teacher, **loading)
        other, theirs = load_model("reference", reference, **loading) if reference else (None, None)
        report(
            add_shaping(
                rows,
                model,
                tokenizer,
                output,
                **options._asdict(),
                reference=other,
                reference_tokenizer=theirs,
                per_token=per_token,
                max_length=max_length,
                batch_size=batch_size,
                skip_bad_rows=skip_bad_rows,
            )
        )


@app.command()
def rewards(
    oracle: Annotated[str, typer.Option(help="A folder that OracleTrainer or DRDOTrainer saved.")],
    dataset: Pairs,
    output: Output,
    split: Split = "train",
    max_length: Annotated[
        int | None, typer.Option(help="Cut sequences after so many of the oracle's tokens.")
    ] = None,
    batch_size: BatchSize = 8,
    skip_bad_rows: SkipBadRows = False,
    dtype: TeachersDtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Add an oracle's rewards to a preference dataset, ready for DRDO.

    Writes the dataset with two columns more, chosen_reward and rejected_reward: one number per
    response, made with the oracle's own tokenizer and chat template, whatever the student's are.

    Stopped at any moment and started again with the same arguments, it goes on where it was. On
    several GPUs: torchrun --nproc-per-node 4 -m fastpref rewards ...
    """
    check_run(output, max_length, batch_size)
    rows = read_rows(dataset, split)
    with precomputing(output) as report:
        model, tokenizer = load_model("oracle", oracle, dtype=dtype, device_map=device_map)
        load_reward_head(model, oracle)
        report(
            add_rewards(
                rows,
                model,
                tokenizer,
                output,
                max_length=max_length,
                batch_size=batch_size,
                skip_bad_rows=skip_bad_rows,
            )
        )


@app.command()
def kd_cache(
    teacher: Teacher,
    student: Annotated[
        str, typer.Option(help="The student that will be trained: a folder or a name on the Hub.")
    ],
    dataset: Pairs,
    output: Output,
    split: Split = "train",
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Keep so many of the teacher's likeliest tokens, for students whose head trains; "
            "without it the whole distribution, as a head that does not train sees it."
        ),
    ] = None,
    chosen_only: Annotated[
        bool, typer.Option("--chosen-only", help="Leave out the rejected responses.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits of both models, in the divergence.")
    ] = 1.0,
    max_length: Annotated[
        int | None, typer.Option(help="Cut sequences after so many tokens, as in training.")
    ] = None,
    batch_size: BatchSize = 8,
    skip_bad_rows: SkipBadRows = False,
    dtype: TeachersDtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Store a teacher's distributions for a dataset.

    Writes the dataset with columns that stand for the teacher in training by vanilla_kd, dckd and
    gkd, whose loss then is the forward KL. Teacher and student have the same tokenizer; the
    student's template is used.

    Stopped at any moment and started again with the same arguments, it goes on where it was. On
    several GPUs: torchrun --nproc-per-node 4 -m fastpref kd-cache ...
    """
    check_run(output, max_length, batch_size)
    check_kd_options(top_k, temperature)
    rows = read_rows(dataset, split)
    with precomputing(output) as report:
        tokenizer = load_tokenizer("student", student)
        model, teacher_tokenizer = load_teacher(teacher, dtype=dtype, device_map=device_map)
        report(
            add_kd_cache(
                rows,
                model,
                tokenizer,
                output,
                student=load_student(student) if top_k is None else None,
                top_k=top_k,
                teacher_tokenizer=teacher_tokenizer,
                chosen_only=chosen_only,
                temperature=temperature,
                max_length=max_length,
                batch_size=batch_size,
                skip_bad_rows=skip_bad_rows,
            )
        )


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context) -> None:
    """Train a student by any method, like trl dpo."""
    if not context.args:  # said again where some are given; TRL's imports take seconds
        required = "--method, --model_name_or_path and --dataset_name: required"
        raise ValueError(f"{required}; see fastpref train --method METHOD --help")
    from fastpref.integrations.trl.command import run

    run(context.args)


@app.command()
def inspect(
    output: Annotated[Path, typer.Option(help="The .html file to write.")],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="As for values. With --values only its tokenizer is loaded, by default "
            "from where the file says."
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Preference pairs, as for values.")] = None,
    values: Annotated[
        list[Path] | None,
        typer.Option(
            help="What fastpref values --per-token wrote, instead of a dataset; may be given "
            "several times, for other potentials of the same rows."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The model that the teacher's preference training started from, for its implicit "
            "reward."
        ),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="The model that would be trained, to compare sizes with.")
    ] = None,
    beta: Annotated[
        float, typer.Option(help="Scales the student's log-probs and the implicit reward.")
    ] = 0.1,
    pairs: Annotated[
        int, typer.Option(help="How many rows are read, spread evenly over the dataset.")
    ] = 200,
    split: Split = "train",
    max_length: Annotated[
        int | None, typer.Option(help="Cut sequences after so many tokens.")
    ] = None,
    batch_size: BatchSize = 8,
    skip_bad_rows: SkipBadRows = False,
    dtype: TeachersDtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Ask whether a teacher tells your pairs apart, before training.

    Prints a verdict on each of its signals, and writes a page with the numbers, plots, and the
    shaping of every token of every pair. The page has the text of the pairs in it.
    """
    check_page(output)
    check_inspection(beta, pairs, max_length, batch_size)
    beside_values: dict[str, object] = {
        "dataset": dataset,
        "reference": reference,
        "split": None if split == "train" else split,
        "max_length": max_length,
    }
    _check_source(teacher, dataset, values, beside_values)
    be_quiet()
    placed: Any = {"dtype": dtype, "device_map": device_map}
    options: dict[str, Any] = {
        "beta": beta,
        "pairs": pairs,
        "batch_size": batch_size,
        "skip_bad_rows": skip_bad_rows,
    }
    if student is not None:
        model, tokenizer = load_model("student", student, **placed)
        options |= {"student": model, "student_tokenizer": tokenizer}
    if values:
        name = teacher or read_settings(values[0])["tokenizer"]
        found = inspect_values(values, load_tokenizer("teacher", name), **options)
    else:
        assert dataset is not None and teacher is not None  # checked above
        rows = read_rows(dataset, split)
        if reference is not None:
            model, tokenizer = load_model("reference", reference, **placed)
            options |= {"reference": model, "reference_tokenizer": tokenizer}
        options["max_length"] = max_length
        found = inspect_teacher(rows, *load_teacher(teacher, **placed), **options)
    write_page(found, output)
    print_verdicts(found)
    typer.echo(f"{output}: the numbers, plots and {len(found.pairs)} pairs")


def _check_source(
    teacher: str | None,
    dataset: str | None,
    values: list[Path] | None,
    beside_values: dict[str, object],
) -> None:
    """Refuse to look at nothing, or at two things; and what files have settled already."""
    if values:
        for name, given in beside_values.items():
            if given is not None:
                refuse(name, "none with --values", repr(given))
        for file in values:
            if not file.is_file():
                refuse("values", "a file that exists", file)
    else:
        for name, given in (("teacher", teacher), ("dataset", dataset)):
            if given is None:
                refuse(name, f"--{name} (or --values with a file)", "none")


def _option(name: re.Match[str]) -> str:
    return "--" + name[1].replace("_", "-")


def _as_typed(message: str) -> str:
    """A message with the names of arguments as the commands have them, ``--batch-size``."""
    group: Any = typer.main.get_command(app)
    names = {one.name for command in group.commands.values() for one in command.params}
    longer = "|".join(name for name in names if "_" in name)
    message = re.sub(rf"(?<![-\w])({longer})\b", _option, message)
    return re.sub(rf"^({'|'.join(names)}):", lambda found: f"{_option(found)}:", message)


def main() -> None:
    """Run the command; what is wrong with its input is one line and exit code 1."""
    try:
        app()
    except (ImportError, ValueError, OSError, NotImplementedError) as error:
        sys.exit(f"fastpref: {_as_typed(' '.join(str(error).split()))}")
