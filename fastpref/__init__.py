"""Fused losses for preference distillation: TVKD, DRDO and what they are compared with."""

from fastpref import losses
from fastpref.data import collate_pairs
from fastpref.linear_losses import drdo_loss, tvkd_loss
from fastpref.losses.pairs import LossOutput
from fastpref.ops import (
    Head,
    TeacherMeans,
    linear_cached_kl,
    linear_cached_kl_with_stats,
    linear_divergence,
    linear_divergence_with_stats,
    linear_logps,
    linear_logps_with_stats,
    linear_logsumexp,
    linear_stats,
    linear_token_preference,
    linear_topk_divergence,
    linear_topk_divergence_with_stats,
    linear_topk_expectation,
    teacher_means,
)
from fastpref.responses import Responses, sum_responses
from fastpref.rewards import sequence_rewards
from fastpref.teacher import shaping_from_values, teacher_shaping

__version__ = "0.1.0"  # which pyproject.toml reads

__all__ = [
    "Head",
    "LossOutput",
    "Responses",
    "TeacherMeans",
    "collate_pairs",
    "drdo_loss",
    "linear_cached_kl",
    "linear_cached_kl_with_stats",
    "linear_divergence",
    "linear_divergence_with_stats",
    "linear_logps",
    "linear_logps_with_stats",
    "linear_logsumexp",
    "linear_stats",
    "linear_token_preference",
    "linear_topk_divergence",
    "linear_topk_divergence_with_stats",
    "linear_topk_expectation",
    "losses",
    "sequence_rewards",
    "shaping_from_values",
    "sum_responses",
    "teacher_means",
    "teacher_shaping",
    "tvkd_loss",
]
