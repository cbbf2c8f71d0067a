"""The command ``fastpref``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from fastpref import __version__
from fastpref.data import read_rows
from fastpref.extras import require_extra
from fastpref.teacher import add_shaping, load_teacher
from fastpref.teacher.model import Dtype, this_process
from fastpref.teacher.precompute import ShapingOptions, check_arguments
from fastpref.teacher.shaping import Form, Potential, Terminal
from fastpref.teacher.store import read_settings

try:
    require_extra("teacher", "the command", "accelerate", "datasets", "transformers", "typer")
    import typer
except ImportError as error:
    sys.exit(f"fastpref: {error}")

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
    teacher: Annotated[
        str, typer.Option(help="A folder, a .gguf file, or a name on the Hugging Face Hub.")
    ],
    dataset: Annotated[
        str,
        typer.Option(
            help="Preference pairs (chosen and rejected, with or without prompt; text or chat "
            "messages): a .jsonl or .parquet file, a saved dataset, or a name on the Hub."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The .parquet file to write.")],
    split: Annotated[str, typer.Option(help="Which split of the dataset.")] = "train",
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
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also write the value of every state.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Cut sequences after so many of the teacher's tokens.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs per batch.")] = 8,
    skip_bad_rows: Annotated[
        bool,
        typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and say which."),
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help='"auto" spreads a large teacher over all GPUs.')
    ] = None,
) -> None:
    """Add a teacher's values to a preference dataset, ready for TVKD.

    Writes the dataset with two columns more, chosen_shaping and rejected_shaping: one number per
    response, made with the teacher's own tokenizer and chat template, whatever the student's are.

    Stopped at any moment and started again with the same arguments, it goes on where it was. On
    several GPUs: torchrun --nproc-per-node 4 -m fastpref values ...
    """
    import datasets
    import transformers

    options = ShapingOptions(potential, temperature, gamma, terminal, form)
    check_arguments(output, options, max_length, batch_size)
    # What these two say and draw is not about values; errors are raised all the same.
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    rows = read_rows(dataset, split)
    model, tokenizer = load_teacher(teacher, dtype=dtype, device_map=device_map)
    found = add_shaping(
        rows,
        model,
        tokenizer,
        output,
        **options._asdict(),
        per_token=per_token,
        max_length=max_length,
        batch_size=batch_size,
        skip_bad_rows=skip_bad_rows,
    )
    if this_process().is_main_process:
        skipped = read_settings(output)["skipped_rows"]
        typer.echo(f"{output}: {len(found)} pairs with chosen_shaping and rejected_shaping")
        if skipped:
            typer.echo(f"left out {len(skipped)} rows: {', '.join(map(str, skipped))}", err=True)


def main() -> None:
    """Run the command; what is wrong with its input is one line and exit code 1."""
    try:
        app()
    except (ImportError, ValueError, OSError, NotImplementedError) as error:
        sys.exit(f"fastpref: {' '.join(str(error).split())}")
