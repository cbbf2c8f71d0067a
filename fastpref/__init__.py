"""Fused losses for preference distillation: TVKD and DRDO without the logits."""

from fastpref.data import collate_pairs
from fastpref.losses import DRDOOutput, OracleOutput, TVKDOutput, drdo_loss, oracle_loss, tvkd_loss
from fastpref.ops import linear_logps, linear_logsumexp, linear_stats
from fastpref.rewards import sequence_rewards
from fastpref.teacher import shaping_from_values, teacher_shaping

__version__ = "0.1.0"  # which pyproject.toml reads

__all__ = [
    "DRDOOutput",
    "OracleOutput",
    "TVKDOutput",
    "collate_pairs",
    "drdo_loss",
    "linear_logps",
    "linear_logsumexp",
    "linear_stats",
    "oracle_loss",
    "sequence_rewards",
    "shaping_from_values",
    "teacher_shaping",
    "tvkd_loss",
]
