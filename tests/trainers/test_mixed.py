"""Several losses at once are the weighted sum of each, and every model reads a batch once."""

from __future__ import annotations

import pytest
import torch
from test_against_logits import (
    assert_same_gradients,
    batch_of,
    naive_loss,
    preference_trainer,
)
from training import dataset, history, models_for, student

from fastpref.integrations.trl.batches import shifted_labels


def models_of(*methods):
    return {name: one for method in methods for name, one in models_for(method).items()}


def loss_of(folder, method, settings, **models):
    """The loss of the first batch, and the trainer, whose model has its gradients."""
    found = preference_trainer(folder, method, settings=settings, **models)
    batch = batch_of(found)
    loss = found.compute_loss(found.model, dict(batch))
    loss.backward()
    return loss, found, batch


MIXTURES = [
    (["simpo", "sft", "vanilla_kd"], [1.0, 0.1, 0.3]),  # logps of all, divergences of the chosen
    (["tdpo", "vanilla_kd", "dckd"], [1.0, 2.0, 0.5]),  # divergences from two models
    (["dpkd_token", "vanilla_kd", "gkd"], [1.0, 1.0, 0.5]),  # three comparisons with one
    (["adpa", "vanilla_kd", "dpo"], [1.0, 0.5, 0.5]),  # an advantage of the rejected beside
    (["sft", "gkd"], [0.5, 0.5]),  # rejected responses are not read at all
    (["kto", "wpo", "dpkd"], [1.0, 0.5, 0.2]),
]


@pytest.mark.parametrize(("methods", "weights"), MIXTURES, ids=str)
def test_the_sum_of_the_losses(tmp_path, methods, weights):
    settings = {"method_weights": weights}
    loss, found, batch = loss_of(tmp_path, methods, settings, **models_of(*methods))
    naive = student()
    expected = torch.zeros(())
    for method, weight in zip(methods, weights, strict=True):
        one = naive_loss(method, naive, batch, models_for(method))
        expected = expected + weight * one
        logged = found._metrics["train"][f"losses/{method}"][0]
        assert logged == pytest.approx(one.item(), rel=1e-4, abs=1e-5), method
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, naive)


def test_tvkd_beside_cloning_and_distillation(tmp_path):
    """With every model's own signals: the teacher gives shaping and divergences in one reading."""
    models = models_for("vanilla_kd")
    settings = {"method_weights": [1.0, 0.1, 0.2]}
    methods = ["tvkd", "sft", "vanilla_kd"]
    data = {"train_dataset": dataset()}
    loss, found, _ = loss_of(tmp_path, methods, settings, **models, **data)
    given = {"tvkd": models, "sft": {}, "vanilla_kd": models}
    alone = {one: loss_of(tmp_path, one, {}, **given[one], **data) for one in methods}
    expected = alone["tvkd"][0] + 0.1 * alone["sft"][0] + 0.2 * alone["vanilla_kd"][0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert len(found.readers) == 1
    logged = history(found)[0]
    assert {"shaping/chosen", "losses/tvkd", "losses/sft", "divergence/chosen"} <= set(logged)


@pytest.mark.parametrize("spread", [False, True])
def test_a_head_that_is_spread_over_processes_is_copied(tmp_path, spread):
    """Since it is whole only while its model runs; any other is the model's own."""
    found = preference_trainer(tmp_path, "dckd", **models_for("dckd"))
    reader, batch = found.readers[0], batch_of(found)
    reader.spread = spread
    _, reading = reader(batch, shifted_labels(batch), 2)
    weight = reader.model.lm_head.weight
    assert reading.head.weight.equal(weight)
    assert (reading.head.weight.data_ptr() == weight.data_ptr()) is not spread


@pytest.mark.parametrize("potential", ["value", "implicit_reward"])
def test_models_run_once(tmp_path, potential):
    models = models_of("dckd", "adpa", "dpkd", "tdpo")
    methods = ["tvkd", "dckd", "adpa", "dpkd", "tdpo", "vanilla_kd"]
    settings = {"potential": potential}
    found = preference_trainer(
        tmp_path, methods, settings=settings, train_dataset=dataset(), **models
    )
    calls = []
    for name, one in (
        ("student", found.model),
        ("reference", found.ref_model),
        *((reader.argument, reader.model) for reader in found.readers),
    ):
        one.model.register_forward_hook(lambda *_, name=name: calls.append(name))
    found.compute_loss(found.model, batch_of(found))
    assert sorted(calls) == ["reference", "student", "teacher_model", "teacher_ref_model"]
