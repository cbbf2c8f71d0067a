"""A digest of every function's results: here, in forked children and in a loader's workers."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys

import torch
from every_function import WAYS, run
from torch.utils.data import DataLoader, Dataset


def digest() -> str:
    """Of every bit of every result and gradient."""
    found = hashlib.sha256()
    for way in WAYS:
        for one in run(*way):
            found.update(str((one.dtype, tuple(one.shape))).encode())
            found.update(one.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Digests(Dataset[str]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> str:
        return digest()


def report(results: multiprocessing.SimpleQueue[str]) -> None:
    results.put(digest())


def main() -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    print(digest())
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    children = [fork.Process(target=report, args=(results,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        print(results.get())
    loader = DataLoader(Digests(), num_workers=2, batch_size=1, multiprocessing_context="fork")
    for (found,) in loader:
        print(found)


if __name__ == "__main__":
    sys.exit(main())
