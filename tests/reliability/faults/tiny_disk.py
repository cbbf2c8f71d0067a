"""Precompute onto disks of a few pages, until they are full, and onto one that is read-only.

Run by ``make faults``, under ``unshare --map-root-user --mount``: it mounts disks in memory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
from tiny_models import rows, tiny_model, tiny_tokenizer

from fastpref.teacher import add_kd_cache
from fastpref.teacher.precompute import check_run

PAGE = 4096


def mount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)


def main() -> None:
    datasets.disable_progress_bars()
    tokenizer, folder = tiny_tokenizer(), Path(tempfile.mkdtemp())
    model, student = tiny_model(tokenizer), tiny_model(tokenizer, seed=1)
    disk = folder / "disk"
    disk.mkdir()

    def precompute(output: Path) -> list:
        options = {"student": student, "batch_size": 1}
        return add_kd_cache(rows(6), model, tokenizer, output, **options).to_list()

    whole, stopped = precompute(folder / "whole.parquet"), set()
    for pages in range(2, 40, 2):
        mount(disk, f"size={pages * PAGE}")
        output = disk / "out.parquet"
        try:
            assert precompute(output) == whole
        except OSError as error:
            name = str(error).split(":")[0]
            assert name.startswith(str(disk)), error
            stopped.add(Path(name).name)
            assert not output.exists() and not list(disk.rglob("*.tmp"))
            mount(disk, f"remount,size={100 * PAGE}")
            assert precompute(output) == whole
        assert [one.name for one in disk.iterdir()] == ["out.parquet"]
        subprocess.run(["umount", disk], check=True)
    print("full while it wrote", *sorted(stopped))
    assert "out.parquet" in stopped and len(stopped) > 1

    mount(disk, f"size={100 * PAGE},ro")
    try:
        check_run(disk / "out.parquet", None, 1)
        sys.exit("a read-only disk was not refused")
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()
