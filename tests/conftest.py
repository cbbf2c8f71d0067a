"""Settings that every test shares."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

settings.register_profile(
    "fastpref",
    deadline=None,
    derandomize=True,
    max_examples=5 if INTERPRETED else 25,  # the interpreter takes a second for some examples
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fastpref")

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores, and what they start
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
