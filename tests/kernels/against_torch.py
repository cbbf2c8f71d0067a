"""What the tests of every launcher share: devices, inputs, and the bound on an error.

Kernels run on CUDA tensors where there is a GPU, else on CPU tensors in Triton's interpreter
(`TRITON_INTERPRET=1`). The bound on an error is the error of a few lines of torch in the inputs'
own dtype: never more than twice that, plus a few units of float32 rounding.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs CUDA or TRITON_INTERPRET=1", allow_module_level=True)

# The interpreter computes with numpy, which warns where a GPU quietly gives 0 or -inf.
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")
INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
examples = settings(max_examples=25, deadline=None, derandomize=True)


class Transform(NamedTuple):
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        y = self.logit_scale * x
        if self.softcap is not None:
            y = self.softcap * torch.tanh(y / self.softcap)
        return y / self.temperature


# What all logits have in common: digits that are lost to it show in every difference.
offsets = st.sampled_from([0.0, 10.0, 100.0, 300.0, -300.0])
transforms = st.builds(
    Transform,
    logit_scale=st.sampled_from([1.0, 0.5]),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` as a kernel stores it: the interpreter truncates to bfloat16, a GPU rounds."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return (exact.float().view(torch.int32) & -(2**16)).view(torch.float32)
    return exact.to(dtype)


def randint(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_as_good_as_torch(
    name: str, actual: Tensor, exact: Tensor, by_torch: Tensor, argument: Tensor | None = None
) -> None:
    """`|actual - exact| <= 2 |by_torch - exact|` in the maximum, plus float32 rounding.

    `argument` is what goes into an exponential: its rounding is relative to its own size, and
    becomes that much relative error of the result.
    """
    assert actual.shape == exact.shape, name
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite].double(), exact[~finite], equal_nan=True)
    actual, exact, by_torch = (t[finite].double() for t in (actual, exact, by_torch))
    if actual.numel():
        error, error_torch = (actual - exact).abs().max(), (by_torch - exact).abs().max()
        rounding = 1e-6 * exact.abs().max().clamp(min=1e-3)
        if argument is not None:
            rounding *= argument.nan_to_num(neginf=0).abs().max().clamp(min=1)
        allowed = 2 * error_torch + rounding
        assert error <= allowed, f"{name}: error {error:.3g}, torch's own {error_torch:.3g}"


def label_and_rest(z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The label's logit of each row, and all logits with -inf at the label."""
    if labels is None:
        return z.new_empty(0), z
    is_label = torch.arange(z.shape[1], device=z.device) == labels[:, None]
    target = torch.where(is_label, z, 0.0).sum(-1)
    target = torch.where(is_label.any(-1), target, NAN)
    return target, z.masked_fill(is_label, -INF)


def sum_above(reference: Tensor, z: Tensor) -> Tensor:
    """`sum(exp(z - reference))` of each row."""
    return (z.double() - reference.double()[:, None]).exp().sum(1)


def spread(values: Tensor) -> Tensor:
    """The same float16 values in rows 2 ** 30 elements apart: no third of them in 32 bits."""
    stride = 2**30
    try:
        # Nothing but the rows is ever touched, so on a CPU the rest takes no memory.
        storage = torch.empty(
            (len(values) - 1) * stride + values.shape[1], dtype=torch.float16, device=DEVICE
        )
    except RuntimeError:
        pytest.skip("no room for the addresses")
    return storage.as_strided(values.shape, (stride, 1)).copy_(values)
