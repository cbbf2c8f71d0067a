"""The persistent projection, held to the tests of the other one."""

from __future__ import annotations

import pytest
import test_interpreted as common
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref.kernels import launch, logsumexp, logsumexp_persistent


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Every projection reads through descriptors: on the CPU the interpreter does."""
    if common.DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a device that copies tiles by itself")
    found = []
    kernel = logsumexp_persistent.persistent_logsumexp

    def noting(*args):
        found.append(1)
        return kernel(*args)

    monkeypatch.setattr(logsumexp, "reads_through_descriptors", lambda *_: True)
    monkeypatch.setattr(logsumexp, "persistent_logsumexp", noting)
    if common.DEVICE == "cpu":  # several pieces a program, in tiles that the interpreter likes
        small = launch.ProjectionConfig(32, 64, 32, 4, 2)
        monkeypatch.setattr(logsumexp_persistent, "persistent_config", lambda _: small)
    yield found
    assert found, "the kernel under test never ran"


# Rows of 16 bytes and their multiples can be described.
@common.examples
@given(
    n=st.integers(1, 140),
    hidden_size=st.sampled_from([8, 32, 104]),
    vocab_size=st.sampled_from([1, 5, 64, 300, 700]),
    dtype=st.sampled_from(common.FLOATS),
    has_bias=st.booleans(),
    has_labels=st.booleans(),
    gathers=st.booleans(),
    transform=common.transforms,
)
def test_it_is_as_good_as_torch(
    n, hidden_size, vocab_size, dtype, has_bias, has_labels, gathers, transform
):
    if common.DEVICE == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16
    common.check_projection(
        common.randn(0, 150 if gathers else n, hidden_size, dtype=dtype),
        common.randn(1, vocab_size, hidden_size, dtype=dtype),
        common.randn(2, vocab_size, dtype=dtype) if has_bias else None,
        common.randint(3, vocab_size, n) if has_labels else None,
        common.randint(4, 150, n) if gathers else None,
        transform,
    )


def test_labels_outside_the_vocabulary():
    labels = torch.tensor([-100, -1, 5, 7, 128, 2**32 + 1, 4], device=common.DEVICE)
    hidden = common.randn(0, 7, 8, dtype=torch.float16)
    common.check_projection(hidden, common.randn(1, 5, 8, dtype=torch.float16), None, labels, None)


def test_a_masked_vocabulary():
    hidden = common.randn(0, 3, 8, dtype=torch.float16)
    weight = common.randn(1, 400, 8, dtype=torch.float16)
    labels = torch.tensor([399, 0, 390], device=common.DEVICE)
    for kept in (slice(390, 400), slice(0, 1), slice(0, 0)):
        bias = torch.full((400,), -common.INF, device=common.DEVICE, dtype=torch.float16)
        bias[kept] = 0.5
        for row_labels in (None, labels):
            common.check_projection(hidden, weight, bias, row_labels, None)
