"""Settings that every test shares."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fastpref",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fastpref")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
