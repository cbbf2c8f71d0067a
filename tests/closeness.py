"""What "equal" means: at most twice the error that plain PyTorch makes in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Hold ``found`` to the error of ``plain`` against ``exact``, which is float64.

    A few unit roundoffs, of the dtype of the result and of float32 sums, allow for plain PyTorch
    being exact by luck on a handful of numbers. Float64 has no more exact witness: there the two
    only have to agree to far more digits than any other dtype has.
    """
    assert found.shape == exact.shape
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)
        return
    error = (found.double() - exact).norm()
    plain_error = (plain.double() - exact).norm()
    roundoff = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    allowed = 2 * plain_error + roundoff * exact.norm()
    assert error <= allowed, f"error {error:.3e}, plain PyTorch {plain_error:.3e}, {allowed=:.3e}"
