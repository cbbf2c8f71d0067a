"""The persistent projection, compiled for the devices that have descriptors."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from test_compiled import KIB, TARGETS, Transform, assert_spills_nothing, compiled

from fastpref.kernels import launch, logsumexp, logsumexp_persistent

KERNEL = (logsumexp_persistent, "_persistent_logsumexp_kernel")
# Tensor cores, and copies of whole tiles.
INSTRUCTIONS = {
    "sm_90": ("wgmma.mma_async", "cp.async.bulk.tensor"),
    "sm_100": ("tcgen05.mma", "cp.async.bulk.tensor"),
}


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
    binary = compiled(monkeypatch, target, KERNEL, projection, (dtype, everything))
    assert_spills_nothing(binary)
    assert binary.shared <= launch.PERSISTENT_SHARED_BYTES <= TARGETS[target][1]
    for instruction in INSTRUCTIONS[target]:
        assert instruction in binary.assembly


def test_products_and_copies_overlap(monkeypatch):
    """In the loop one product is in flight while the next one is issued, and copies go ahead."""
    monkeypatch.setattr(logsumexp, "reads_through_descriptors", lambda *_: True)
    binary = compiled(monkeypatch, "sm_90", KERNEL, projection, (torch.bfloat16, True))
    before, loop = binary.assembly.split("wgmma.mma_async", 1)
    copies = "cp.async.bulk.tensor"
    stages_ahead = launch.PERSISTENT_CONFIG.num_stages - 1
    assert before.count(copies) == 2 * stages_ahead
    assert "m64n256k16" in loop
    in_flight, later = loop.split(copies, 1)
    assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", in_flight) == ["1"]
    assert later.count(copies) == 1


@pytest.mark.parametrize("row_blocks", [32, 128])
@pytest.mark.parametrize("tiles", [501, 594, 1024])
def test_programs_share_the_work_evenly(row_blocks, tiles):
    """Heads of the benchmark, 132 multiprocessors: at most 1 % above an even share."""
    each = logsumexp_persistent.even_split(row_blocks, tiles, 132)
    splits = -(-tiles // each)
    busiest = -(-row_blocks * splits // 132) * each
    assert busiest <= 1.01 * row_blocks * tiles / 132


@pytest.mark.parametrize(("row_blocks", "tiles"), [(1, 501), (1, 7), (3, 1), (1000, 3)])
def test_few_tiles_are_shared_out_too(row_blocks, tiles):
    each = logsumexp_persistent.even_split(row_blocks, tiles, 132)
    busiest = -(-row_blocks * -(-tiles // each) // 132) * each
    assert busiest == min(
        -(-row_blocks * -(-tiles // one) // 132) * one for one in range(1, tiles + 1)
    )


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")


def chosen(
    monkeypatch, hidden, *, weight=None, capability=(9, 0), rows=4096, backend="cuda", shared=227
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    properties = SimpleNamespace(shared_memory_per_block_optin=shared * KIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(launch, "backend", lambda: backend)
    operands = (one.as_subclass(OnCuda) for one in (hidden, hidden if weight is None else weight))
    return launch.reads_through_descriptors(*operands, rows)


def test_descriptors_are_for_large_16_bit_products_on_hopper_and_later(monkeypatch):
    operand = torch.empty(4, 64, dtype=torch.bfloat16)
    assert chosen(monkeypatch, operand)
    assert chosen(monkeypatch, operand.half())
    assert chosen(monkeypatch, operand, capability=(10, 0))
    assert chosen(monkeypatch, operand, rows=65)
    assert not chosen(monkeypatch, operand, capability=(8, 9))
    assert not chosen(monkeypatch, operand, capability=(12, 0), shared=99)
    assert not chosen(monkeypatch, operand.float())
    assert not chosen(monkeypatch, operand, rows=64)
    assert not chosen(monkeypatch, operand, backend="hip")
    assert not launch.reads_through_descriptors(operand, operand, 4096)


def test_operands_that_cannot_be_described(monkeypatch):
    operand = torch.empty(4, 128, dtype=torch.bfloat16)
    assert chosen(monkeypatch, operand[:, :64])
    for awkward in (
        operand[:, :63],  # gathered rows would be 126 bytes apart
        torch.empty(4, 63, dtype=torch.bfloat16),
        torch.empty(4 * 68, dtype=torch.bfloat16).as_strided((4, 64), (68, 1)),
        operand[:, 1:65],
        operand[:, ::2],
        operand.T,
        operand[:1, :64].expand(4, 64),
    ):
        assert not chosen(monkeypatch, awkward, weight=operand), awkward.stride()
        assert not chosen(monkeypatch, operand, weight=awkward), awkward.stride()
