"""What every method owes: gradients, finite numbers at extremes, metrics, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_loss_arguments import loss_arguments, responses_of
from torch import Tensor

from fastpref import Responses
from fastpref.losses import METHODS
from fastpref.responses import Tokens

# Constants of a loss, whose gradient is another one than that of the function.
CONSTANT = {"kto": ("desirable", "kl_log_ratios"), "wpo": ("log_weights",)}
# Of which the derivative is that of the function.
SMOOTH: dict[str, dict[str, Any]] = {"tdpo": {"stop_gradient": False}}


def random_arguments(method: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Numbers of all sizes, for two pairs."""
    found = {}
    for name, one in loss_arguments(method).items():
        values = torch.randn(one.shape, dtype=dtype)
        found[name] = values > 0 if one.dtype == torch.bool else values
    return found


def count_of(method: str) -> int:
    return len(responses_of(method).logps)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    lengths = torch.tensor([3, 1, 2, 4])[: count_of(method)]
    given = random_arguments(method)
    leaves = {name: one for name, one in given.items() if name not in CONSTANT.get(method, ())}
    logps = -3 * torch.rand(count_of(method), dtype=torch.float64) - 0.1

    def loss(logps: Tensor, *values: Tensor) -> Tensor:
        changed = given | dict(zip(leaves, values, strict=True))
        return METHODS[method](Responses(logps, lengths), **changed, **SMOOTH.get(method, {})).loss

    inputs = [one.clone().requires_grad_() for one in (logps, *leaves.values())]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4])
@pytest.mark.parametrize("empty", [True, False])
def test_extremes_are_finite(method, size, empty):
    """Certain and impossible responses, log-ratios in the ten thousands, and no tokens at all."""
    count = count_of(method)
    signs = torch.tensor([[1.0, -1, -1, 1], [-1, 1, 1, 1], [1, 1, 1, 1], [-1, -1, -1, -1]])
    for sign in signs:
        logps = (-size * (sign[:count] < 0).float()).requires_grad_()
        lengths = torch.full((count,), 0 if empty else 3)
        given = {
            name: one if one.dtype == torch.bool else -size * sign[: len(one)]
            for name, one in loss_arguments(method).items()
        }
        leaves = [one.requires_grad_() for one in given.values() if one.is_floating_point()]
        if "log_weights" in given:  # means per token: no more than the log of a vocabulary's size
            given["log_weights"] = given["log_weights"].detach().clamp(-12, 12)
        found = METHODS[method](Responses(logps, lengths), **given)
        with torch.autograd.set_detect_anomaly(True):  # no NaN on the way that is masked later
            found.loss.backward()
        assert all(one.isfinite().all() for one in found)
        assert all(one.grad is None or one.grad.isfinite().all() for one in (logps, *leaves))


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_detached(method):
    given = random_arguments(method)
    leaves = [one.requires_grad_() for one in given.values() if one.is_floating_point()]
    logps = -torch.rand(count_of(method), dtype=torch.float64).requires_grad_()
    lengths = torch.ones(count_of(method), dtype=torch.int64)
    found = METHODS[method](Responses(logps, lengths), **given)
    assert found.loss.requires_grad and found.loss.dim() == 0
    assert not any(one.requires_grad for one in found[1:])
    assert all(one.requires_grad for one in leaves)  # nothing was detached in place


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_of_the_likelihood_whatever_the_tokens_weigh(method):
    given, count = random_arguments(method, torch.float32), count_of(method)
    logps, lengths = -torch.rand(count) - 0.5, torch.ones(count, dtype=torch.int64)
    plain = METHODS[method](Responses(logps, lengths), **given)._asdict()
    weighted = METHODS[method](Responses(2 * logps, lengths, logps), **given)._asdict()
    for name in plain:
        of_likelihood = name.endswith(("logps", "rewards")) or name == "nll_loss"
        if of_likelihood:
            assert torch.equal(plain[name], weighted[name]), name
    of_likelihood_alone = ("oracle", "vanilla_kd", "gkd", "dckd", "adpa", "dpkd_token")
    if method not in of_likelihood_alone:
        assert plain["loss"] != weighted["loss"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_dtype_is_that_of_the_log_probabilities(method, dtype):
    other = torch.float64 if dtype == torch.float32 else torch.bfloat16
    count = count_of(method)
    responses = Responses(-torch.rand(count, dtype=dtype), torch.ones(count, dtype=torch.int64))
    found = METHODS[method](responses, **random_arguments(method, other))
    for name, one in found._asdict().items():
        assert one.dtype == (torch.bool if name == "desirable" else dtype), name


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_summed(method):
    given, count = random_arguments(method), count_of(method)
    logps = -torch.rand(count, 5, dtype=torch.float64)
    tokens = Tokens(logps, torch.rand(count, 5) < 0.7, None, None)
    found, expected = METHODS[method](tokens, **given), METHODS[method](tokens.sums(), **given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# One of each kind: of tokens, of pairs, with a detached part, unpaired, of divergences.
@pytest.mark.parametrize("method", ["tvkd", "drdo", "orpo", "tdpo", "kto", "gkd", "adpa"])
def test_compiles_in_one_graph(method):
    given, count = random_arguments(method, torch.float32), count_of(method)
    leaves = [one.requires_grad_() for one in given.values() if one.is_floating_point()]
    lengths = torch.arange(count)

    def run(function: Any) -> list[Tensor]:
        logps = (-torch.arange(1.0, count + 1)).requires_grad_()
        loss = function(logps)
        wanted = [logps, *leaves]
        return [loss.detach(), *torch.autograd.grad(loss, wanted, materialize_grads=True)]

    def loss(logps: Tensor) -> Tensor:
        return METHODS[method](Responses(logps, lengths), **given).loss

    torch._dynamo.reset()  # of the methods before, since there are more than it keeps
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled), run(loss), strict=True):
        torch.testing.assert_close(one, other)
