"""TVKD and DRDO as trainers of TRL: one changed line in a DPO script.

========================================  =====================================================
`TVKDTrainer`, `TVKDConfig`               a student learns from preferences, shaped by a teacher
`DRDOTrainer`, `DRDOConfig`               a student matches an oracle's rewards as it does
`OracleTrainer`, `OracleConfig`           DRDO's first stage, which makes the oracle
========================================  =====================================================
"""

from fastpref.integrations.trl.supported import require_supported_trl

require_supported_trl()

from fastpref.integrations.trl.drdo import DRDOConfig, DRDOTrainer  # noqa: E402  # after the check
from fastpref.integrations.trl.oracle import OracleConfig, OracleTrainer  # noqa: E402  # as above
from fastpref.integrations.trl.tvkd import TVKDConfig, TVKDTrainer  # noqa: E402  # as above

__all__ = [
    "DRDOConfig",
    "DRDOTrainer",
    "OracleConfig",
    "OracleTrainer",
    "TVKDConfig",
    "TVKDTrainer",
]
