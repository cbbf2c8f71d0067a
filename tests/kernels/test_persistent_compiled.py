"""The persistent projection, compiled for the devices that have descriptors."""

from __future__ import annotations

import pytest
import torch
from test_compiled import TARGETS, Transform, compiled

from fastpref.kernels import launch, logsumexp, logsumexp_persistent

KERNEL = (logsumexp_persistent, "_persistent_logsumexp_kernel")
# Tensor cores, and copies of whole tiles.
INSTRUCTIONS = {
    "sm_90": ("wgmma.mma_async", "cp.async.bulk.tensor"),
    "sm_100": ("tcgen05.mma", "cp.async.bulk.tensor"),
}
CAPABILITY = {"sm_90": (9, 0), "sm_100": (10, 0)}


def projection(dtype: torch.dtype, everything: bool) -> None:
    hidden_size = 1000 if everything else 1024
    positions = torch.zeros(4096, dtype=torch.int64) if everything else None
    logsumexp.projection_logsumexp(
        torch.empty(4096, hidden_size, dtype=dtype),
        torch.empty(512, hidden_size, dtype=dtype),
        torch.empty(512, dtype=dtype) if everything else None,
        positions,
        positions,
        Transform(softcap=30.0 if everything else None),
    )


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", INSTRUCTIONS)
def test_fits_spills_nothing_and_uses_the_hardware(monkeypatch, target, dtype, everything):
    monkeypatch.setattr(logsumexp, "reads_through_descriptors", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: CAPABILITY[target])
    config = launch.persistent_config(torch.device("cuda"))
    monkeypatch.setattr(logsumexp_persistent, "persistent_config", lambda _: config)
    binary = compiled(monkeypatch, target, KERNEL, projection, (dtype, everything))
    assert not any(binary.spills.values()), binary.spills
    assert binary.shared <= TARGETS[target][1]
    for instruction in INSTRUCTIONS[target]:
        assert instruction in binary.assembly


@pytest.mark.parametrize(
    ("row_blocks", "tiles"),
    [(32, 501), (128, 501), (32, 594), (128, 594), (32, 1024), (128, 1024), (1, 7), (3, 1)],
)
def test_no_program_has_much_more_to_do_than_its_share(row_blocks, tiles):
    """Heads of the benchmark, 132 multiprocessors: at most 7 % above an even share."""
    each = logsumexp_persistent.even_split(row_blocks, tiles, 132)
    splits = -(-tiles // each)
    busiest = -(-row_blocks * splits // 132) * each
    share = max(row_blocks * tiles / 132, 1.0)
    assert busiest <= 1.07 * share or row_blocks * tiles < 132


def test_descriptors_are_for_large_16_bit_products_on_hopper_and_later(monkeypatch):
    def chosen(capability=(9, 0), dtype=torch.bfloat16, rows=4096, width=64, backend="cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(launch, "backend", lambda: backend)

        class OnCuda(torch.Tensor):
            device = torch.device("cuda")

        hidden, weight = (torch.empty(4, width, dtype=dtype).as_subclass(OnCuda) for _ in range(2))
        return launch.reads_through_descriptors(hidden, weight, rows)

    assert chosen() and chosen(capability=(10, 0)) and chosen(dtype=torch.float16)
    assert not chosen(capability=(8, 9))
    assert not chosen(dtype=torch.float32)
    assert not chosen(rows=64)
    assert not chosen(width=63)
    assert not chosen(backend="hip")
    hidden = torch.empty(4, 64, dtype=torch.bfloat16)
    assert not launch.reads_through_descriptors(hidden, hidden, 4096)
