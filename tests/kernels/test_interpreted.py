"""Every launcher against a few lines of float64 torch.

On CUDA tensors where there is a GPU, else on CPU tensors in Triton's interpreter
(`TRITON_INTERPRET=1`). The bound on an error is the error of the same lines of torch in the inputs'
own dtype: never more than twice that, plus a few units of float32 rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs CUDA or TRITON_INTERPRET=1", allow_module_level=True)

from fastpref.kernels.drdo_pairs import drdo_pairs  # noqa: E402
from fastpref.kernels.logsumexp import projection_logsumexp  # noqa: E402
from fastpref.kernels.tiles import fold_tile, gradient_tile  # noqa: E402
from fastpref.kernels.tvkd_pairs import tvkd_pairs  # noqa: E402

# The interpreter computes with numpy, which warns where a GPU quietly gives 0 or -inf, and before
# Triton 3.7 about loop bounds that are arrays of one element (an error from numpy 2.4 on).
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")

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


# projection_logsumexp


def label_and_rest(z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    if labels is None:
        return z.new_empty(0), z.logsumexp(-1)
    is_label = torch.arange(z.shape[1], device=z.device) == labels[:, None]
    target = torch.where(is_label, z, 0.0).sum(-1)
    target = torch.where(is_label.any(-1), target, NAN)
    return target, z.masked_fill(is_label, -INF).logsumexp(-1)


def check_projection(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    rows: Tensor | None,
    transform: Transform = Transform(),  # noqa: B008
) -> None:
    actual = projection_logsumexp(hidden, weight, bias, labels, rows, transform)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        chosen = hidden if rows is None else hidden[rows]
        x = chosen.to(dtype) @ weight.to(dtype).T
        return label_and_rest(transform(x if bias is None else x + bias.to(dtype)), labels)

    exact, by_torch = plain(torch.float64), plain(hidden.dtype)
    names = ("target_logit", "lse_other")
    for name, *tensors in zip(names, actual, exact, by_torch, strict=True):
        assert tensors[0].dtype == torch.float32
        assert_as_good_as_torch(name, *tensors)


@examples
@given(
    n=st.integers(1, 70),
    hidden_size=st.sampled_from([1, 7, 32, 64, 100]),
    vocab_size=st.sampled_from([1, 5, 128, 300]),
    dtype=st.sampled_from(FLOATS),
    has_bias=st.booleans(),
    has_labels=st.booleans(),
    gathers=st.booleans(),
    transform=transforms,
)
def test_projection_logsumexp(
    n: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    has_bias: bool,
    has_labels: bool,
    gathers: bool,
    transform: Transform,
) -> None:
    check_projection(
        randn(0, 80 if gathers else n, hidden_size, dtype=dtype),
        randn(1, vocab_size, hidden_size, dtype=dtype),
        randn(2, vocab_size, dtype=dtype) if has_bias else None,
        randint(3, vocab_size, n) if has_labels else None,
        randint(4, 80, n) if gathers else None,
        transform,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_projection_of_many_rows(dtype: torch.dtype) -> None:
    """More row blocks than run together, of the tile shape for many rows, the last one ragged."""
    n = 17 * 128 - 3 if dtype == torch.bfloat16 else 140
    hidden, weight = randn(0, n, 16, dtype=dtype), randn(1, 150, 16, dtype=dtype)
    check_projection(hidden, weight, None, randint(2, 150, n), None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_projection_of_strided_inputs(dtype: torch.dtype) -> None:
    hidden = randn(0, 33, 2 * 9, dtype=dtype).T[::2]
    weight = randn(1, 33, 140, dtype=dtype).T
    bias, labels = randn(2, 140, 3, dtype=dtype)[:, 1], randint(3, 140, 9, 2)[:, 0]
    check_projection(hidden, weight, bias, labels, None)


def test_projection_of_labels_outside_the_vocabulary() -> None:
    labels = torch.tensor([-100, -1, 5, 7, 128, 2**32 + 1, 4], device=DEVICE)
    hidden, weight = randn(0, 7, 8), randn(1, 5, 8)
    check_projection(hidden, weight, None, labels, None)
    target, lse = projection_logsumexp(hidden, weight, None, labels, None, Transform())
    assert target.isnan().tolist() == [True] * 6 + [False]
    assert lse.isfinite().all()


def test_projection_with_masked_vocabulary() -> None:
    """Tiles, splits and whole rows of -inf: no NaN, and their probability is 0."""
    hidden, weight = randn(0, 3, 8), randn(1, 400, 8)
    labels = torch.tensor([399, 0, 390], device=DEVICE)
    for kept in (slice(390, 400), slice(0, 1), slice(0, 0)):
        bias = torch.full((400,), -INF, device=DEVICE)
        bias[kept] = 0.5
        for row_labels in (None, labels):
            check_projection(hidden, weight, bias, row_labels, None)


def test_labels_far_above_the_rest() -> None:
    """The other logits keep their logsumexp where `exp(other - label)` is 0."""
    hidden, weight = randn(0, 2, 8), randn(1, 300, 8)
    labels = torch.tensor([299, 299], device=DEVICE)
    bias = torch.zeros(300, device=DEVICE)
    bias[labels] = 500.0
    check_projection(hidden, weight, bias, labels, None)
    maximum, sum_exp, target_logit = hidden.new_tensor([[LOWEST] * 2, [0.0] * 2, [NAN] * 2])
    tile = hidden @ weight.T + bias
    fold_tile(tile, labels, 0, Transform(), maximum, sum_exp, target_logit)
    exact = label_and_rest(tile.double(), labels)
    torch.testing.assert_close(target_logit.double(), exact[0])
    torch.testing.assert_close((maximum + sum_exp.log()).double(), exact[1], rtol=1e-6, atol=1e-6)


def test_projection_of_a_vocabulary_of_one() -> None:
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    target, lse = projection_logsumexp(
        randn(0, 2, 4), randn(1, 1, 4), None, labels, None, Transform()
    )
    assert torch.nn.functional.logsigmoid(target - lse).tolist() == [0.0, 0.0]


def test_projection_of_no_rows() -> None:
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    hidden, weight = randn(0, 3, 4), randn(1, 5, 4)
    target, lse = projection_logsumexp(hidden, weight, None, nothing, nothing, Transform())
    assert target.shape == lse.shape == (0,)


def test_offsets_past_32_bits() -> None:
    """Rows that start 2 ** 30 elements apart: the third is past what 32 bits can count."""
    stride, n = 2**30, 3

    def spread(values: Tensor) -> Tensor:
        try:
            # Nothing but the rows is ever touched, so on a CPU the rest takes no memory.
            storage = torch.empty(
                (n - 1) * stride + values.shape[1], dtype=torch.float16, device=DEVICE
            )
        except RuntimeError:
            pytest.skip("no room for the addresses")
        return storage.as_strided(values.shape, (stride, 1)).copy_(values)

    hidden, weight = randn(0, n, 16, dtype=torch.float16), randn(1, n, 16, dtype=torch.float16)
    labels, rows = randint(2, n, n), torch.tensor([2, 0, 1], device=DEVICE)
    check_projection(spread(hidden), weight, None, labels, rows)
    check_projection(hidden, spread(weight), None, labels, None)
    tile, lse = randn(3, n, 16), randn(4, n)
    out = spread(torch.zeros_like(tile, dtype=torch.float16))
    gradient_tile(tile, labels, 0, Transform(), lse, lse, lse, out)
    expected = torch.empty_like(tile)
    gradient_tile(tile, labels, 0, Transform(), lse, lse, lse, expected)
    torch.testing.assert_close(out, expected.half())


# tiles


@examples
@given(
    n=st.integers(1, 4),
    widths=st.lists(st.sampled_from([1, 6, 40, 1030]), min_size=1, max_size=3),
    dtype=st.sampled_from([None, *FLOATS, "tile"]),
    has_labels=st.booleans(),
    masked=st.booleans(),
    transform=transforms,
)
def test_fold_tile(
    n: int,
    widths: list[int],
    dtype: torch.dtype | str | None,
    has_labels: bool,
    masked: bool,
    transform: Transform,
) -> None:
    """Tile after tile, caller-style: the exponentials of earlier tiles are rescaled."""
    vocab_size = sum(widths)
    x = 5 * randn(0, n, vocab_size)
    if masked:
        x[:, : vocab_size // 2 + 1] = -INF
    # One past either end: labels that no tile has.
    labels = randint(1, vocab_size + 2, n) - 1 if has_labels else None
    maximum = torch.full((n,), LOWEST, device=DEVICE)
    sum_exp = torch.zeros(n, device=DEVICE)
    target_logit = torch.full((n,), NAN, device=DEVICE)
    accumulated = torch.zeros(n, vocab_size, device=DEVICE)
    start = 0
    for width in widths:
        # A view with a row stride of its own.
        tile = x[:, start : start + width].clone() if dtype == "tile" else x[:, start:][:, :width]
        exponentials = rescale = None
        if dtype is not None:
            rescale = torch.empty(n, device=DEVICE)
            exponentials = tile if dtype == "tile" else torch.empty_like(tile, dtype=dtype)
        fold_tile(
            tile, labels, start, transform, maximum, sum_exp, target_logit, exponentials, rescale
        )
        if exponentials is not None and rescale is not None:
            accumulated *= rescale[:, None]
            accumulated[:, start : start + width] = exponentials
        start += width

    exact_target, exact_lse = label_and_rest(transform(x.double()), labels)
    torch_target, torch_lse = label_and_rest(transform(x), labels)
    if labels is not None:
        assert_as_good_as_torch("target_logit", target_logit, exact_target, torch_target)
    lse = maximum + sum_exp.log()
    assert_as_good_as_torch("logsumexp", lse, exact_lse, torch_lse)
    if dtype is not None:
        is_label = torch.zeros_like(x, dtype=torch.bool)
        if labels is not None:
            is_label = torch.arange(vocab_size, device=DEVICE) == labels[:, None]

        def shares(of: Tensor) -> Tensor:
            of = of.detach().requires_grad_()
            z = transform(of)
            (slope,) = torch.autograd.grad(z.sum(), of)
            share = torch.exp(z - maximum[:, None]) * slope
            return share.masked_fill(is_label | of.isneginf(), 0.0).detach()

        exact, own = shares(x.double()), shares(x)
        if isinstance(dtype, torch.dtype):
            own = rounded(own, dtype)
        argument = transform(x.double())
        assert_as_good_as_torch("exponentials", accumulated, exact, own, argument)


@examples
@given(
    n=st.integers(1, 4),
    width=st.sampled_from([1, 6, 40, 1030]),
    dtype=st.sampled_from([*FLOATS, "tile"]),
    has_labels=st.booleans(),
    masked=st.booleans(),
    transform=transforms,
)
def test_gradient_tile(
    n: int,
    width: int,
    dtype: torch.dtype | str,
    has_labels: bool,
    masked: bool,
    transform: Transform,
) -> None:
    vocab_start = 48
    tile = 5 * randn(0, n, width + 3)[:, 1 : width + 1]
    if masked:
        tile[:, : width // 2] = -INF
    # Some labels are in other tiles.
    labels = randint(1, width + 4, n) + vocab_start - 2 if has_labels else None
    lse = transform(tile.double()).logsumexp(-1).float()
    # A loss that sums hands out one number to all rows.
    by_probability, by_label = randn(2, n), randn(3, 1).expand(n)

    def plain(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        z = transform(x)
        (slope,) = torch.autograd.grad(z.sum(), x)
        gradient = by_probability[:, None] * torch.exp(z - lse[:, None]) * slope
        if labels is not None:
            is_label = torch.arange(width, device=DEVICE) + vocab_start == labels[:, None]
            gradient = torch.where(is_label, by_label[:, None] * slope, gradient)
        return gradient.detach()

    argument, exact, own = transform(tile.double()), plain(tile.double()), plain(tile)
    out = tile if dtype == "tile" else torch.empty(n, width, device=DEVICE, dtype=dtype)
    gradient_tile(tile, labels, vocab_start, transform, lse, by_probability, by_label, out)
    assert_as_good_as_torch("gradient", out, exact, rounded(own, out.dtype), argument)


# pairs


class Batch(NamedTuple):
    """Flat tokens of `2B` sequences, some of them empty or masked as a whole."""

    mask: Tensor
    offsets: Tensor
    logps: Tensor

    def sums(self, values: Tensor) -> Tensor:
        ends = self.offsets.tolist()
        masked = torch.where(self.mask, values, 0.0)
        return torch.stack([masked[a:b].sum() for a, b in zip(ends, ends[1:], strict=False)])


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    pairs = draw(st.integers(1, 3))
    lengths = draw(
        st.lists(st.sampled_from([0, 1, 3, 1100]), min_size=2 * pairs, max_size=2 * pairs)
    )
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, dtype)
    n = sum(lengths)
    # NaN where masked: what is there must not be read.
    mask = randn(0, n) > draw(st.sampled_from([-INF, -0.5, INF]))
    scale = draw(st.sampled_from([1e-3, 1.0]))
    return Batch(mask, offsets, torch.where(mask, -scale * randn(1, n).abs(), NAN))


def check_pairs(
    batch: Batch,
    actual: tuple[Tensor, ...],
    loss: Callable[[Tensor], Tensor],
) -> None:
    """The four outputs that both kernels have, against autograd of `loss` of the logps."""
    losses, logps_sums, lengths, coefficients = actual

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        logps = torch.where(batch.mask, batch.logps, 0.0).to(dtype).requires_grad_()
        value = loss(logps)
        (gradient,) = torch.autograd.grad(value.sum(), logps)
        return value.detach(), batch.sums(logps).detach(), gradient

    names = ("losses", "logps_sums", "token_coefficients")
    tensors = (losses, logps_sums, coefficients)
    exact, by_torch = plain(torch.float64), plain(torch.float32)
    for name, *versions in zip(names, tensors, exact, by_torch, strict=True):
        # Losses and their slopes are exponentials of the sums.
        assert_as_good_as_torch(name, *versions, exact[1])
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == batch.sums(batch.mask.double()).long().tolist()
    assert (coefficients[~batch.mask] == 0).all()


@examples
@given(
    batch=batches(),
    has_ref=st.booleans(),
    has_weights=st.booleans(),
    beta=st.sampled_from([0.1, 2.0]),
    alpha=st.sampled_from([0.0, 1.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    length_normalize=st.booleans(),
)
def test_tvkd_pairs(
    batch: Batch,
    has_ref: bool,
    has_weights: bool,
    beta: float,
    alpha: float,
    label_smoothing: float,
    length_normalize: bool,
) -> None:
    sequences = len(batch.offsets) - 1
    # Without alpha nothing of the shaping may get through, not even inf * 0.
    shaping = 10 * randn(2, sequences) if alpha else torch.full((sequences,), INF, device=DEVICE)
    ref_logps = 10 * randn(3, sequences) if has_ref else None
    weights = torch.where(batch.mask, randn(4, len(batch.mask)).abs(), NAN) if has_weights else None
    actual = tvkd_pairs(
        batch.logps, batch.mask, batch.offsets, shaping, ref_logps, weights,
        beta=beta, alpha=alpha, label_smoothing=label_smoothing, length_normalize=length_normalize,
    )  # fmt: skip

    def loss(logps: Tensor) -> Tensor:
        total = batch.sums(logps if weights is None else logps * weights.nan_to_num().to(logps))
        margin = beta * (total if ref_logps is None else total - ref_logps.to(logps))
        if alpha:
            margin = margin - alpha * shaping.to(logps)
        if length_normalize:
            margin = margin / batch.sums(batch.mask.to(logps)).clamp(min=1)
        difference = margin[: sequences // 2] - margin[sequences // 2 :]
        agree, differ = (torch.nn.functional.logsigmoid(d) for d in (difference, -difference))
        return -(1 - label_smoothing) * agree - label_smoothing * differ

    check_pairs(batch, actual, loss)


@examples
@given(
    batch=batches(),
    alpha=st.sampled_from([0.0, 0.1]),
    gamma=st.sampled_from([0.0, 1.0, 2.0]),
    length_normalize=st.booleans(),
    detach_focal=st.booleans(),
)
def test_drdo_pairs(
    batch: Batch, alpha: float, gamma: float, length_normalize: bool, detach_focal: bool
) -> None:
    sequences = len(batch.offsets) - 1
    student, oracle = randn(2, sequences), randn(3, sequences)
    actual = drdo_pairs(
        batch.logps, batch.mask, batch.offsets, student, oracle,
        alpha=alpha, gamma=gamma, length_normalize=length_normalize, detach_focal=detach_focal,
    )  # fmt: skip

    def difference(values: Tensor) -> Tensor:
        return values[: sequences // 2] - values[sequences // 2 :]

    def loss(logps: Tensor) -> Tensor:
        z = batch.sums(logps)
        if length_normalize:
            z = z / batch.sums(batch.mask.to(logps)).clamp(min=1)
        below_zero = z[sequences // 2 :].clamp(max=-torch.finfo(torch.float32).eps)
        log_odds = z[: sequences // 2] - torch.log(-torch.expm1(below_zero))
        focal = torch.exp(gamma * torch.nn.functional.logsigmoid(-difference(z)))
        focal = focal.detach() if detach_focal else focal
        error = (difference(oracle) - difference(student)).to(logps)
        return error**2 - alpha * focal * log_odds

    check_pairs(batch, actual[:4], loss)
    expected = -2 * (difference(oracle) - difference(student)).double()
    torch.testing.assert_close(actual[4].double(), expected)


@pytest.mark.parametrize("size", [1e-7, 2e-7, 1e-6, 1e-3, 0.3, 0.69, 0.7, 3.0, 20.0, 200.0])
def test_drdo_near_and_far_from_certainty(size: float) -> None:
    """`log1mexp` and its derivative are accurate to float32 rounding at any `z_l`."""
    batch = Batch(
        mask=torch.ones(2, dtype=torch.bool, device=DEVICE),
        offsets=torch.arange(3, device=DEVICE),
        logps=torch.tensor([-0.5, -size], device=DEVICE),
    )
    rewards = torch.zeros(2, device=DEVICE)
    losses, _, _, coefficients, _ = drdo_pairs(
        batch.logps, batch.mask, batch.offsets, rewards, rewards,
        alpha=1.0, gamma=0.0, length_normalize=False, detach_focal=True,
    )  # fmt: skip
    logps = batch.logps.double().requires_grad_()
    below_zero = logps[1].clamp(max=-torch.finfo(torch.float32).eps)
    exact = torch.log(-torch.expm1(below_zero)) - logps[0]
    exact.backward()
    torch.testing.assert_close(losses[0].double(), exact.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(coefficients.double(), logps.grad, rtol=1e-6, atol=1e-12)


def test_no_pairs() -> None:
    batch = Batch(
        mask=torch.empty(0, dtype=torch.bool, device=DEVICE),
        offsets=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        logps=torch.empty(0, device=DEVICE),
    )
    nothing = torch.empty(0, device=DEVICE)
    losses, *_ = tvkd_pairs(
        *(batch.logps, batch.mask, batch.offsets, nothing, None, None),
        beta=0.1, alpha=1.0, label_smoothing=0.0, length_normalize=False,
    )  # fmt: skip
    assert losses.shape == (0,)
    losses, *_ = drdo_pairs(
        *(batch.logps, batch.mask, batch.offsets, nothing, nothing),
        alpha=0.1, gamma=2.0, length_normalize=False, detach_focal=False,
    )  # fmt: skip
    assert losses.shape == (0,)
