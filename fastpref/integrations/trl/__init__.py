"""Every loss of `fastpref.losses` as a trainer of TRL: one changed line in a DPO script.

========================================  =====================================================
`PreferenceTrainer`, `PreferenceConfig`   ``method="tvkd"``, ``"drdo"``, ``"dpo"``, ``"ipo"``...
`TVKDTrainer`, `TVKDConfig`               a student learns from preferences, shaped by a teacher
`DRDOTrainer`, `DRDOConfig`               a student matches an oracle's rewards as it does
`OracleTrainer`, `OracleConfig`           DRDO's first stage, which makes the oracle
========================================  =====================================================
"""

from importlib.metadata import version

from fastpref.extras import require_extra

_MODULES = ("accelerate", "datasets", "safetensors", "transformers", "trl")
require_extra("trl", "fastpref.integrations.trl", *_MODULES)
_TRL = version("trl")
# Any release may change the methods that we override: the range is that of pyproject.toml.
if _TRL.split(".")[:2] not in (["1", "14"], ["1", "15"], ["1", "16"]):
    raise ImportError(
        f"fastpref.integrations.trl: expected TRL 1.14 to 1.16, got {_TRL}; "
        "pip install 'trl>=1.14,<1.17'"
    )

from fastpref.integrations.trl.config import (  # noqa: E402  # after the check
    DRDOConfig,
    OracleConfig,
    PreferenceConfig,
    TVKDConfig,
)
from fastpref.integrations.trl.trainer import (  # noqa: E402  # after the check
    DRDOTrainer,
    OracleTrainer,
    PreferenceTrainer,
    TVKDTrainer,
)

__all__ = [
    "DRDOConfig",
    "DRDOTrainer",
    "OracleConfig",
    "OracleTrainer",
    "PreferenceConfig",
    "PreferenceTrainer",
    "TVKDConfig",
    "TVKDTrainer",
]
