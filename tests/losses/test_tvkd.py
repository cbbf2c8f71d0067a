from __future__ import annotations

import math
from typing import Any

import formulas
import pytest
import torch
from batches import DTYPES, Batch, batches, hold_equal, hold_to_reference, some_of
from closeness import assert_no_worse
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import Head, LossOutput, tvkd_loss

LABELS = torch.tensor([[-100, 3, 0, 4], [2, -100, 1, -100], [-100, 6, 5, 2], [1, 2, 3, -100]])
OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.1, 0.5, 1]),
        "alpha": st.sampled_from([1.0, 0.0, 0.4, 2]),
        "length_normalize": st.booleans(),
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.5]),
        "sft_weight": st.sampled_from([0.0, 0.3]),
    }
)
COST = st.fixed_dictionaries(
    {"compact": st.booleans(), "scratch_bytes": st.sampled_from([0, 200, 10**6])}
)
TENSORS = ("states", "weight", "bias", "shaping", "ref_logps", "token_weights")


def extras(batch: Batch, names: set[str]) -> dict[str, Tensor]:
    rows, length = batch.labels.shape
    found = {
        "shaping": batch.normal(rows),
        "ref_logps": -4 * batch.normal(rows).abs(),
        "token_weights": batch.normal(rows, length).abs(),
    }
    return {name: values for name, values in found.items() if name in names}


def padded_loss(batch: Batch, leaves: dict[str, Tensor], **options: Any) -> LossOutput:
    return tvkd_loss(
        leaves["states"][:, :-1],
        batch.head(leaves),
        batch.labels,
        leaves["shaping"],
        ref_logps=leaves.get("ref_logps"),
        token_weights=leaves.get("token_weights"),
        ignore_index=batch.ignore_index,
        temperature=batch.temperature,
        **options,
    )


def packed_loss(batch: Batch, leaves: dict[str, Tensor], **options: Any) -> LossOutput:
    weights = leaves.get("token_weights")
    if weights is not None:  # what lies beyond the labels is never read
        weights = batch.pack(torch.nn.functional.pad(weights, (0, 1), value=math.nan))
    return tvkd_loss(
        batch.pack(leaves["states"]),
        batch.head(leaves),
        batch.packed_labels(),
        leaves["shaping"],
        ref_logps=leaves.get("ref_logps"),
        token_weights=weights,
        ignore_index=batch.ignore_index,
        cu_seqlens=batch.cu_seqlens(),
        temperature=batch.temperature,
        **options,
    )


def reference_loss(batch: Batch, leaves: dict[str, Tensor], **options: Any) -> Tensor:
    return formulas.tvkd_loss(
        leaves["states"][:, :-1],
        batch.head(leaves),
        batch.labels,
        leaves["shaping"],
        ref_logps=leaves.get("ref_logps"),
        token_weights=leaves.get("token_weights"),
        ignore_index=batch.ignore_index,
        temperature=batch.temperature,
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    batch=batches(),
    options=OPTIONS,
    cost=COST,
    trains=some_of(*TENSORS),
    optional=st.sets(st.sampled_from(["ref_logps", "token_weights"])),
)
def test_equals_the_reference(dtype, batch, options, cost, trains, optional):
    more = extras(batch, {"shaping", *optional})
    hold_to_reference(
        lambda leaves: padded_loss(batch, leaves, **options, **cost).loss,
        lambda leaves: reference_loss(batch, leaves, **options),
        lambda dtype: batch.leaves(dtype, trains, **more),
        dtype,
        scale=options["beta"] * batch.largest_sum(),
        sharpness=options["beta"] * batch.largest_sum(),
    )


@given(batch=batches(), options=OPTIONS, cost=COST, trains=some_of(*TENSORS))
def test_packed_equals_padded(batch, options, cost, trains):
    more = extras(batch, set(TENSORS))

    def results(function: Any) -> dict[str, Tensor]:
        leaves = batch.leaves(torch.float64, trains, **more)
        found = function(batch, leaves, **options, **cost)
        if found.loss.requires_grad:
            found.loss.backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {**{name: one.detach() for name, one in found._asdict().items()}, **gradients}

    hold_equal(results(packed_loss), results(padded_loss))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(batch=batches(), options=OPTIONS, referenced=st.booleans())
def test_metrics_are_the_sums_behind_the_loss(dtype, batch, options, referenced):
    more = extras(batch, {"shaping", "ref_logps"} if referenced else {"shaping"})
    exact, plain, ours = (
        batch.leaves(one, {"states", "shaping"}, **more) for one in (torch.float64, dtype, dtype)
    )
    found = padded_loss(batch, ours, **options)
    assert not any(values.requires_grad for values in found[1:])

    def metrics(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        logps = formulas.linear_logps(
            leaves["states"][:, :-1],
            batch.head(leaves),
            batch.labels,
            ignore_index=batch.ignore_index,
            temperature=batch.temperature,
        ).detach()
        lengths = batch.mask.sum(1).clamp_min(1)
        sums = logps.sum(1)
        rewards = options["beta"] * (sums - leaves["ref_logps"] if referenced else sums).detach()
        if options["length_normalize"]:
            rewards = rewards / lengths
        pairs = len(sums) // 2
        chosen_tokens = max(int(batch.mask[:pairs].sum()), 1)
        return {
            "chosen_logps": sums[:pairs],
            "rejected_logps": sums[pairs:],
            "chosen_rewards": rewards[:pairs],
            "rejected_rewards": rewards[pairs:],
            "nll_loss": -sums[:pairs].sum() / chosen_tokens,
        }

    expected, rough = metrics(exact), metrics(plain)
    for name, values in expected.items():
        assert_no_worse(getattr(found, name), rough[name], values, dtype)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradcheck(trained, packed):
    hidden = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=trained)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=trained)
    shaping = torch.randn(4, dtype=torch.float64, requires_grad=trained)
    ref_logps = torch.randn(4, dtype=torch.float64, requires_grad=trained)
    token_weights = torch.rand(4, 4, dtype=torch.float64, requires_grad=trained)
    labels, cu_seqlens = LABELS, None
    if packed:
        labels, cu_seqlens = LABELS.masked_fill(torch.arange(4) == 3, -100), torch.arange(5) * 4

    def loss(hidden, weight, bias, shaping, ref_logps, token_weights):
        return tvkd_loss(
            hidden.reshape(-1, 3) if packed else hidden,
            Head(weight, bias, softcap=4.0),
            labels.reshape(-1) if packed else labels,
            shaping,
            beta=0.7,
            alpha=0.6,
            ref_logps=ref_logps,
            length_normalize=True,
            label_smoothing=0.2,
            token_weights=token_weights.reshape(-1) if packed else token_weights,
            sft_weight=0.4,
            cu_seqlens=cu_seqlens,
            temperature=1.3,
        ).loss

    leaves = (hidden, weight, bias, shaping, ref_logps, token_weights)
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_row_without_labels_counts_zero(dtype, length_normalize, compact, trained):
    hidden = torch.randn(4, 4, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(9, 8, dtype=dtype, requires_grad=trained)
    labels = LABELS.clone()
    labels[0] = labels[3] = -100  # the chosen one of a pair, the rejected one of the other
    options = {"length_normalize": length_normalize, "compact": compact}
    found = tvkd_loss(hidden, weight, labels, torch.zeros(4), sft_weight=0.5, **options)
    found.loss.backward()
    assert found.chosen_logps[0] == found.rejected_logps[1] == 0
    assert found.chosen_rewards[0] == found.rejected_rewards[1] == 0
    assert found.loss.isfinite() and found.nll_loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[0] == 0).all() and (hidden.grad[3] == 0).all()
    assert (hidden.grad[1] != 0).any() and (hidden.grad[2] != 0).any()
    if trained:
        assert weight.grad.isfinite().all() and (weight.grad != 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_batch_without_labels_is_a_differentiable_constant(
    dtype, length_normalize, compact, trained
):
    hidden = torch.randn(4, 4, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(9, 8, dtype=dtype, requires_grad=trained)
    options = {"length_normalize": length_normalize, "compact": compact, "sft_weight": 0.5}
    found = tvkd_loss(hidden, weight, torch.full((4, 4), -100), torch.zeros(4), **options)
    torch.testing.assert_close(found.loss.item(), math.log(2), rtol=1e-7, atol=0)
    found.loss.backward()
    assert found.nll_loss == 0
    assert (hidden.grad == 0).all()
    if trained:
        assert (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_any_integer_labels_will_do(dtype, packed):
    # -100 wraps to 156 in uint8 and -1000 to 24 in int8: neither token is to be taken for ignored.
    top = torch.iinfo(dtype).max
    labels = torch.tensor([[24, 1, top], [24, top, 2]]).clamp_max(199)
    labels[0, 1] = 156 if top >= 156 else 100
    hidden, weight = torch.randn(2, 3, 8), torch.randn(200, 8)
    for ignore_index in (-100, -1000, 2):
        ours = {"labels": labels.to(dtype), "shaping": torch.zeros(2), "hidden": hidden}
        if packed:
            ours = {
                "labels": torch.tensor([24, 156 if top >= 156 else 100, 2, 24, 2]).to(dtype),
                "hidden": torch.cat((hidden[0, :2], hidden[0, 2:], hidden[1, :1], hidden[1, 2:])),
                "shaping": torch.zeros(2),
                "cu_seqlens": torch.tensor([0, 3, 5], dtype=dtype),
            }
            ignore_index = 2
        theirs = {**ours, "labels": ours["labels"].long()}
        found = tvkd_loss(head=weight, ignore_index=ignore_index, **ours)
        expected = tvkd_loss(head=weight, ignore_index=ignore_index, **theirs)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_strided_cu_seqlens_will_do():
    labels, boundaries = torch.tensor([4, 9, -100, 3, -100]), torch.tensor([0, 7, 3, 7, 5])
    hidden, weight = torch.randn(5, 8), torch.randn(20, 8)
    found, expected = (
        tvkd_loss(hidden, weight, labels, torch.zeros(2), cu_seqlens=one).loss
        for one in (boundaries[::2], boundaries[::2].clone())
    )
    assert found == expected


def test_an_empty_packed_sequence_counts_zero():
    hidden = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    found = tvkd_loss(
        hidden,
        torch.randn(20, 8, dtype=torch.float64),
        torch.tensor([4, 9, -100]),
        torch.zeros(2),
        cu_seqlens=torch.tensor([0, 3, 3]),
    )
    found.loss.backward()
    assert found.rejected_logps == 0 and found.chosen_logps < 0
    assert (hidden.grad[:2] != 0).any() and (hidden.grad[2] == 0).all()


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("alpha", [0, 0.0])
def test_without_alpha_the_shaping_is_not_read(alpha, wants_gradient):
    # One that wants a gradient takes the formula in PyTorch, one that does not the kernel's.
    hidden, weight = torch.randn(4, 4, 8, requires_grad=True), torch.randn(9, 8)
    shaping = torch.full((4,), math.nan, requires_grad=wants_gradient)
    found = tvkd_loss(hidden, weight, LABELS, shaping, alpha=alpha)
    expected = tvkd_loss(hidden, weight, LABELS, torch.zeros(4))
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_a_certain_model_gets_finite_gradients(certain):
    hidden = torch.ones(2, 1, 1, requires_grad=True)
    weight = torch.tensor([[200.0], [0.0]])  # token 0 is certain, token 1 hopeless
    labels = torch.tensor([[0], [1]] if certain == "chosen" else [[1], [0]])
    found = tvkd_loss(hidden, weight, labels, torch.zeros(2), beta=1.0)
    found.loss.backward()
    expected = 0.0 if certain == "chosen" else 200.0
    torch.testing.assert_close(found.loss.item(), expected, rtol=1e-6, atol=1e-30)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_compiles_without_graph_breaks(trained, packed):
    if packed:
        labels = torch.tensor([4, 9, -100, 3, -100])
        cu_seqlens, hidden = torch.tensor([0, 3, 5]), torch.randn(5, 8)
    else:
        labels, cu_seqlens = torch.tensor([[4, 9, 2], [1, -100, 3]]), None
        hidden = torch.randn(2, 3, 8)
    hidden.requires_grad_()
    weight = torch.randn(20, 8, requires_grad=trained)
    shaping, ref_logps = torch.tensor([1.5, 0.5]), torch.tensor([-4.0, -3.0])

    def outputs(beta: float) -> LossOutput:
        return tvkd_loss(
            hidden, weight, labels, shaping, beta=beta, ref_logps=ref_logps,
            label_smoothing=0.1, sft_weight=0.2, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    wanted = [hidden, weight] if trained else [hidden]
    compiled = torch.compile(outputs, fullgraph=True)
    for beta in (0.1, 0.3):  # another hyper-parameter, another trace
        expected, found = outputs(beta), compiled(beta)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        assert not any(values.requires_grad for values in found[1:])
        gradients = [torch.autograd.grad(one.loss, wanted) for one in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
