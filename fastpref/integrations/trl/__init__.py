"""Every loss of `fastpref.losses` as a trainer of TRL: one changed line in a DPO script.

========================================  =====================================================
`PreferenceTrainer`, `PreferenceConfig`   ``method="tvkd"``, ``"drdo"``, ``"dpo"``, ``"ipo"``...
`TVKDTrainer`, `TVKDConfig`               a student learns from preferences, shaped by a teacher
`DRDOTrainer`, `DRDOConfig`               a student matches an oracle's rewards as it does
`OracleTrainer`, `OracleConfig`           DRDO's first stage, which makes the oracle
========================================  =====================================================
"""

from fastpref.integrations.trl.supported import require_supported_trl

require_supported_trl()

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
