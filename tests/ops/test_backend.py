"""Where kernels run; products of 16-bit operands into float32 sums, which only a GPU computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastpref.ops import backend
from fastpref.ops.backend import multiply


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_pytorch_takes_the_arguments_of_a_product_with_wide_sums(dtype, add):
    """Tensors without data show at least what PyTorch refuses."""
    left, right = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((3, 4), (4, 5)))
    out = torch.empty(3, 5, device="meta")
    before = out.data_ptr(), out.stride()
    try:
        multiply(left, right, out, add=add)
    except TypeError as error:
        if "'torch.dtype' and 'Tensor'" not in str(error):
            raise
        pytest.skip("without data PyTorch 2.11 takes addmm's out_dtype for a factor of the sum")
    assert (out.data_ptr(), out.stride()) == before and out.dtype == torch.float32
    with pytest.raises(RuntimeError):
        multiply(left, right.T, out, add=add)
    with pytest.raises(RuntimeError):
        multiply(left, right, out.to(torch.float64), add=add)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("right_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sums_in_the_dtype_of_the_left_operand(dtype, right_dtype):
    left, right = torch.randn(3, 4, dtype=dtype), torch.randn(4, 5).to(right_dtype)
    out = torch.full((3, 5), torch.nan, dtype=dtype)
    multiply(left, right, out)
    product = left @ right.to(dtype)
    torch.testing.assert_close(out, product)
    multiply(left, right, out, add=True)
    torch.testing.assert_close(out, 2 * product)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
@pytest.mark.parametrize("interpreted", ["0", "1"])
@pytest.mark.parametrize("installed", [True, False])
def test_kernels_run_on_their_devices_or_interpreted(device, interpreted, installed, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(backend, "triton", object() if installed else None)

    def served(dtype: torch.dtype) -> bool:
        return backend.uses_triton(
            SimpleNamespace(dtype=dtype, device=SimpleNamespace(type=device))
        )

    expected = installed and (device in ("cuda", "xpu") or interpreted == "1")
    assert served(torch.float32) == served(torch.bfloat16) == expected
    assert not served(torch.float64)
