"""Labels outside the vocabulary are refused, or NaN where nobody reads them."""

from __future__ import annotations

import pytest
import torch
from bad_input import LOSSES, arguments, refused

import fastpref


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_labels_outside_the_vocabulary(name, trained, dtype):
    changes = {
        "hidden": torch.randn(4, 3, 8, dtype=dtype, requires_grad=True),
        "head": torch.randn(20, 8, dtype=dtype, requires_grad=trained),
        "labels": arguments(name)["labels"],
    }
    expected = "-100 (ignore_index) or values in [0, 20)"
    for label in (20, 10**12, -1, -99, -101):
        changes["labels"][2, 1] = label
        refused(name, "labels", expected, f"1 outside, the first of them {label}", **changes)
        with torch.no_grad():
            refused(name, "labels", expected, f"1 outside, the first of them {label}", **changes)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("potential", ["value", "margin"])
def test_a_teachers_labels_outside_its_vocabulary(potential, packed):
    name, expected = "teacher_shaping", "-100 (ignore_index) or values in [0, 20)"
    for position, label in ((0, 20), (1, 10**12), (2, -1)):
        given = arguments(name, packed=packed)
        given["labels"].view(4, -1)[0, position] = label
        got = f"1 outside, the first of them {label}"
        refused(name, "labels", expected, got, packed=packed, **given, potential=potential)
        found = fastpref.teacher_shaping(**given, potential=potential, compact=False)
        assert found[0].isnan() and found[1:].isfinite().all()


@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
def test_another_ignore_index_is_not_spared(name):
    refused(name, "labels", "-1 (ignore_index)", "the first of them -100", ignore_index=-1)


@pytest.mark.parametrize("name", LOSSES)
def test_packed_labels_outside_the_vocabulary(name):
    labels = arguments(name, packed=True)["labels"]
    labels[4] = 33
    refused(name, "labels", "[0, 20)", "the first of them 33", packed=True, labels=labels)


@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_without_compaction_a_bad_label_is_nan(name, trained):
    changed = arguments(name)
    changed["hidden"].requires_grad_()
    changed["head"].requires_grad_(trained)
    for label in (20, 10**12, -1):
        changed["labels"][1, 1] = label
        found = getattr(fastpref, name)(**changed, compact=False)
        if name == "linear_logps":
            assert found[1, 1].isnan() and found[0].isfinite().all() and found[2:].isfinite().all()
        else:
            assert found.loss.isnan() and found.chosen_logps[0].isfinite()
            assert found.chosen_logps[1].isnan() and found.rejected_logps.isfinite().all()
