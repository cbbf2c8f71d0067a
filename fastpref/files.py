"""Files that are whole or absent, and that are refused by their name where they are damaged."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

SHA256 = "fastpref_sha256"
UNSEALED = "0" * 64
# Where Parquet's footer has a digest: after its name, the type and the length of the value.
_SEAL = re.compile(SHA256.encode() + rb".{1,4}?([0-9a-f]{64})", re.DOTALL)
_BYTES_AT_ONCE = 2**20


@contextmanager
def written(file: Path, folder: Path | None = None) -> Iterator[Path]:
    """Where to write what then takes the place of ``file`` whole; nothing of it stays otherwise.

    It is beside the file, or in another folder of the same disk.
    """
    temporary = (folder or file.parent) / f"{file.name}.tmp"
    try:
        yield temporary
        _flush(temporary)  # else a machine that fails may keep the name without the contents
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{file}: could not be written ({error})") from error
        raise


def _flush(file: Path) -> None:
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The contents of a safetensors file that carries its digest."""
    from safetensors.torch import save

    whole = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    return save(whole, metadata={SHA256: _digest_of(whole)})


@contextmanager
def opened_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file of which parts can be read; refused is one that has no such parts."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: expected a safetensors file, got a damaged one ({error})") from (
            error
        )


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; refused is one that is damaged."""
    with opened_tensors(file) as opened:
        expected = (opened.metadata() or {}).get(SHA256)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    if expected is not None and _digest_of(tensors) != expected:
        raise ValueError(f"{file}: expected the numbers that were written, got others: damaged")
    return tensors


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, one in sorted(tensors.items()):
        digest.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        digest.update(one.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal(file: Path) -> None:
    """Put a Parquet file's digest where its metadata have `UNSEALED` under `SHA256`."""
    with file.open("r+b") as opened:
        found = _find_seal(opened)
        assert found is not None
        place, _ = found
        digest = _digest_around(opened, place)
        opened.seek(place)
        opened.write(digest.encode())


def check_seal(file: Path) -> None:
    """Refuse a Parquet file that is not as it was sealed; one that never was is let pass."""
    with file.open("rb") as opened:
        found = _find_seal(opened)
        if found is not None and _digest_around(opened, found[0]) != found[1]:
            raise ValueError(f"{file}: expected the bytes that were written, got others: damaged")


def _find_seal(file: BinaryIO) -> tuple[int, str] | None:
    """Where a Parquet file has its digest, and the digest."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    length = int.from_bytes(file.read(4), "little")  # of the footer, before four more bytes
    start = max(size - 8 - length, 0)
    file.seek(start)
    found = _SEAL.search(file.read(length))
    return None if found is None else (start + found.start(1), found[1].decode())


def _digest_around(file: BinaryIO, place: int) -> str:
    """Of everything in a file, with `UNSEALED` at a place."""
    digest = hashlib.sha256()
    file.seek(0)
    left = place
    while left:
        part = file.read(min(left, _BYTES_AT_ONCE))
        digest.update(part)
        left -= len(part)
    digest.update(UNSEALED.encode())
    file.seek(len(UNSEALED), os.SEEK_CUR)
    while part := file.read(_BYTES_AT_ONCE):
        digest.update(part)
    return digest.hexdigest()
