"""Build sdist and wheel, install them into clean environments, and run what the README promises.

.ci/check_install.py       all environments; `make check-install` calls it
.ci/check_install.py NAME  the checks of one environment, called by that environment's Python

An environment is a virtual environment that sees neither this repository nor the Python that runs
this script. PyTorch is installed once; each environment starts as a copy of that, and that of the
Hub's library as a copy of the one with Triton.
"""

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable
from email.parser import Parser
from glob import glob
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ADVICE = ": pip install '.[{}]' in a clone of fastpref"


def main() -> None:
    """Check every environment, the smallest first."""
    # Nothing of this process's Python may reach theirs, and no test may reach a network.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(python: Path | str, *arguments: object, **extra: str) -> None:
        command = [str(part) for part in (python, *arguments)]
        subprocess.run(command, cwd=empty, env=variables | extra, check=True)

    def pip(python: Path, *arguments: object) -> None:
        run(python, "-m", "pip", "-q", "--disable-pip-version-check", *arguments)

    with TemporaryDirectory() as name:
        folder = Path(name)
        empty = folder / "empty"
        empty.mkdir()
        start = time.monotonic()
        constraints = ("-c", ROOT / "constraints.txt")
        run(sys.executable, "-m", "venv", folder / "build")
        python = python_of(folder / "build")
        pip(python, "install", *constraints, "build", "hatchling")
        build = (python, "-m", "build", "--no-isolation")
        run(*build, "--outdir", folder / "dist", ROOT)  # the wheel from the sdist
        run(*build, "--wheel", "--outdir", folder / "tree", ROOT)
        sdist, wheel = one_file(folder / "dist", ".tar.gz"), one_file(folder / "dist", ".whl")
        check_wheel(wheel)
        assert wheel.read_bytes() == one_file(folder / "tree", ".whl").read_bytes()
        run(sys.executable, "-m", "venv", folder / "base")
        pip(python_of(folder / "base"), "install", *constraints, "torch")
        print(f"sdist, wheel and PyTorch: {time.monotonic() - start:.0f} s", flush=True)
        for environment in CHECKS:
            start = time.monotonic()
            copy = folder / environment
            start_from = folder / ("triton" if environment == "hub" else "base")
            shutil.copytree(start_from, copy, symlinks=True, copy_function=os.link)
            python = python_of(copy)
            # The wheel is made of the sdist: one environment shows that this installs, too.
            wanted = {"bare": sdist, "hub": "kernels"}.get(environment, f"{wheel}[{environment}]")
            pip(python, "install", *constraints, wanted)
            run(python, "-I", __file__, environment)
            if environment == "triton":  # its interpreter needs numpy, its compiler does not
                pip(python, "install", *constraints, "numpy")
            if environment in ("triton", "hub"):
                run(python, "-I", __file__, environment, TRITON_INTERPRET="1")
            print(f"{environment}: {time.monotonic() - start:.0f} s", flush=True)


def python_of(environment: Path) -> Path:
    """The Python of a virtual environment."""
    return environment / "bin" / "python"


def one_file(folder: Path, suffix: str) -> Path:
    """The only file with a suffix."""
    (file,) = folder.glob(f"*{suffix}")
    return file


def check_wheel(wheel: Path) -> None:
    """No module has been forgotten, nothing else is in the wheel, and the metadata is whole."""
    modules = glob("fastpref/**/*.py", root_dir=ROOT, recursive=True)
    archive = zipfile.ZipFile(wheel)
    packed = archive.namelist()
    ours = [name for name in packed if ".dist-info/" not in name]
    others = glob("fastpref/inspection/template/*", root_dir=ROOT)
    assert len(others) == 3, others
    assert sorted(ours) == sorted([*modules, *others, "fastpref/py.typed"]), ours
    assert "fastpref/kernels/tiles.py" in ours
    (licence,) = (name for name in packed if name.endswith(".dist-info/licenses/LICENSE"))
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    (name,) = (name for name in packed if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text("utf-8")


def check_bare() -> None:
    """PyTorch alone: losses work, and whatever needs more says what to install."""
    for module in ("datasets", "numpy", "safetensors", "transformers", "trl", "typer"):
        assert find_spec(module) is None, f"{module} is installed: this environment is not clean"
    check_package()
    check_loss()
    check_advice()


def check_triton() -> None:
    """The kernels can be imported, and run where they are interpreted."""
    check_package()
    kernels = Path(importlib.import_module("fastpref").__file__ or "").parent / "kernels"
    for file in kernels.glob("*.py"):
        importlib.import_module(f"fastpref.kernels.{file.stem}")
    if os.environ.get("TRITON_INTERPRET") != "1":
        check_advice()
    check_loss()


def check_teacher() -> None:
    """A teacher's values for a dataset, by the command, and batches of the result."""
    import torch

    import fastpref.teacher

    check_package()
    check_loss()
    tokenizer, _ = save_pairs_and_teacher()
    assert command("--version").stdout.split() == [fastpref.__version__]
    output = "pairs-with-values.parquet"
    arguments = ("--teacher", "teacher", "--dataset", "pairs.jsonl", "--output", output)
    done = command("values", *arguments)
    assert done.returncode == 0 and "7 pairs" in done.stdout, done
    rows = list(fastpref.teacher.load_shaping(output))
    batch = fastpref.collate_pairs(rows, tokenizer)
    shaping = [row[f"{side}_shaping"] for side in ("chosen", "rejected") for row in rows]
    assert torch.equal(batch["shaping"], torch.tensor(shaping))
    assert batch["labels"].shape[0] == 14
    arguments = ("--teacher", "teacher", "--dataset", "pairs.jsonl", "--output", "report.html")
    done = command("inspect", *arguments)
    assert done.returncode == 0 and "report.html" in done.stdout, done
    assert "</html>" in Path("report.html").read_text("utf-8")


def check_trl() -> None:
    """A trainer makes a step."""
    from fastpref.integrations.trl import TVKDConfig, TVKDTrainer
    from fastpref.teacher import add_shaping

    check_package()
    tokenizer, models = save_pairs_and_teacher()
    pairs = add_shaping("pairs.jsonl", models.tiny_model(tokenizer), tokenizer, "pairs.parquet")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    trainer = TVKDTrainer(
        models.tiny_model(tokenizer, seed=1),
        args=TVKDConfig("student", max_steps=1, per_device_train_batch_size=2, **options),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 1


def check_hub() -> None:
    """The Hub's library loads the package of kernels, with fastpref beside it."""
    sys.path.insert(0, str(ROOT / "tests"))
    layout = runpy.run_path(str(ROOT / ".ci" / "hub_kernels.py"))
    layout["main"](Path("build", "hub-kernels"))

    import torch
    from hub_package import check_page, operators
    from kernels._rust import Digest, DigestAlgorithm

    import fastpref.ops
    from kernels import get_loaded_kernels

    package = check_page("docs/hub_kernels.md")
    (loaded,) = get_loaded_kernels()
    assert package.__name__ == loaded.metadata.id
    assert operators(package.__name__) < operators("fastpref")
    assert package.ops.backend.uses_triton(torch.zeros(1)) == (
        os.environ.get("TRITON_INTERPRET") == "1"
    )
    assert package.__all__ == fastpref.ops.__all__
    check_loss()
    for variant in Path("build", "hub-kernels", "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text("utf-8"))
        found = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
        assert found.files == metadata["digest"]["files"], variant


CHECKS: dict[str, Callable[[], None]] = {
    "bare": check_bare,
    "triton": check_triton,
    "hub": check_hub,
    "teacher": check_teacher,
    "trl": check_trl,
}


def check_package() -> None:
    """What is imported is what was installed, whole."""
    import fastpref
    import fastpref.data
    import fastpref.inspection
    import fastpref.models
    import fastpref.parallel
    import fastpref.teacher

    folder = Path(fastpref.__file__).parent
    assert folder.is_relative_to(sys.prefix), folder
    assert fastpref.__version__ == version("fastpref")
    assert (folder / "py.typed").is_file()
    assert (folder / "kernels").is_dir() and not (folder / "kernels").is_symlink()
    assert find_spec("fastpref.kernels.tiles") is not None
    # transformers imports a package of this name from the Hub's authors where there is one.
    assert find_spec("kernels") is None


def check_loss() -> None:
    """TVKD, forward and backward, against the formula with full logits."""
    import torch
    from torch.nn.functional import logsigmoid

    import fastpref
    from fastpref.ops.backend import uses_triton

    assert uses_triton(torch.zeros(1)) == (os.environ.get("TRITON_INTERPRET") == "1")
    torch.manual_seed(0)
    states = torch.randn(2, 5, 8)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.tensor([[-100, 7, 8, 9], [-100, 3, 4, 5]])
    shaping = fastpref.teacher_shaping(states, weight.detach(), labels)
    loss = fastpref.tvkd_loss(states[:, :-1], weight, labels, shaping).loss
    loss.backward()

    plain = weight.detach().requires_grad_()
    logits = states @ plain.T
    values = logits.detach().logsumexp(-1)
    expected_shaping = values[:, -1] - values[:, 1]
    logps = logits[:, 1:-1].log_softmax(-1).gather(-1, labels[:, 1:, None]).sum((1, 2))
    chosen, rejected = 0.1 * logps - expected_shaping
    expected = -logsigmoid(chosen - rejected)
    expected.backward()
    torch.testing.assert_close(shaping, expected_shaping)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weight.grad, plain.grad)


def check_advice() -> None:
    """What needs an extra says which, in an ImportError of ours."""
    from fastpref import collate_pairs
    from fastpref.inspection import inspect_teacher, inspect_values
    from fastpref.models import load_reward_head
    from fastpref.teacher import add_kd_cache, add_shaping, load_shaping, load_teacher, read_rows

    Path("pairs.parquet").touch()
    calls: list[tuple[str, str, Callable[[], Any]]] = [
        ("collate_pairs", "teacher", lambda: collate_pairs([{}], None)),
        ("load_reward_head", "teacher", lambda: load_reward_head(None, ".")),
        ("add_shaping", "teacher", lambda: add_shaping([], None, None, "out.parquet")),
        ("add_kd_cache", "teacher", lambda: add_kd_cache([], None, None, "out.parquet", top_k=1)),
        ("inspect_teacher", "teacher", lambda: inspect_teacher([], None, None)),
        ("inspect_values", "teacher", lambda: inspect_values("pairs.parquet", None)),
        ("load_shaping", "teacher", lambda: load_shaping("pairs.parquet")),
        ("load_teacher", "teacher", lambda: load_teacher("teacher")),
        ("read_rows", "teacher", lambda: read_rows("pairs.parquet")),
        ("fastpref.integrations.trl", "trl", lambda: __import__("fastpref.integrations.trl")),
    ]
    for name, extra, call in calls:
        try:
            call()
        except ImportError as error:
            assert f"{name} needs " in str(error), error
            assert str(error).endswith(ADVICE.format(extra)), error
        else:
            raise AssertionError(f"{name} did not ask for the extra {extra}")
    for arguments, extra in (
        (["--version"], "teacher"),
        (["values", "--help"], "teacher"),
        (["train", "--help"], "trl"),
    ):
        done = command(*arguments)
        last_line = done.stderr.splitlines()[-1]  # PyTorch without numpy says so above it
        assert done.returncode == 1 and "Traceback" not in done.stderr, done
        assert last_line.startswith("fastpref: the command needs "), done
        assert last_line.endswith(ADVICE.format(extra)), done


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command that was installed."""
    script = Path(sysconfig.get_path("scripts")) / "fastpref"
    return subprocess.run([script, *arguments], capture_output=True, text=True)


def save_pairs_and_teacher() -> tuple[Any, SimpleNamespace]:
    """Write pairs.jsonl and a folder with a tiny teacher; returns its tokenizer, and its module."""
    models = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "tiny_models.py")))
    tokenizer = models.tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    models.tiny_model(tokenizer).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, models.rows())), "utf-8")
    return tokenizer, models


if __name__ == "__main__":
    if sys.argv[1:]:
        with TemporaryDirectory() as scratch:
            os.chdir(scratch)
            CHECKS[sys.argv[1]]()
    else:
        main()
