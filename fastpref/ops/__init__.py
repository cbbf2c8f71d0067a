"""Primitives: hidden states and a head in, per-token numbers out, never the logits."""

from fastpref.ops.head import Head
from fastpref.ops.linear_cached_kl import linear_cached_kl, linear_cached_kl_with_stats
from fastpref.ops.linear_divergence import (
    DivergenceWithStats,
    linear_divergence,
    linear_divergence_with_stats,
)
from fastpref.ops.linear_logps import (
    LogpsWithStats,
    linear_logps,
    linear_logps_with_stats,
    linear_logsumexp,
)
from fastpref.ops.linear_stats import linear_stats
from fastpref.ops.linear_token_preference import linear_token_preference
from fastpref.ops.linear_topk import (
    linear_topk_divergence,
    linear_topk_divergence_with_stats,
    linear_topk_expectation,
)
from fastpref.ops.teacher_means import TeacherMeans, teacher_means

__all__ = [
    "DivergenceWithStats",
    "Head",
    "LogpsWithStats",
    "TeacherMeans",
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
    "teacher_means",
]
