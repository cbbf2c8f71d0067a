"""The planted errors are in the machine code: the compiler has not optimised them away."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("needs the compiler: TRITON_INTERPRET is on", allow_module_level=True)

import planted  # noqa: E402  # skipped without Triton
import torch  # noqa: E402  # skipped without Triton
from instructions import HOPPER, Launch, compile_launch  # noqa: E402  # skipped without Triton


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("_read_beyond_kernel", ["ld.global.b32", "st.global.b32"]),
        ("_race_kernel", ["st.volatile.shared.b32", "ld.volatile.shared.b32"]),
        ("_divergent_barrier_kernel", ["@waits bar.sync 0"]),
    ],
)
def test_planted(name, found):
    x = torch.empty(planted.BLOCK)
    arguments = {"x_ptr": x, "out_ptr": x, "BLOCK": planted.BLOCK}
    options = {"num_warps": 2}
    compiled = compile_launch(Launch(getattr(planted, name), arguments, options), HOPPER)
    assert compiled.asm["cubin"]
    for instruction in found:
        assert instruction in compiled.asm["ptx"]
