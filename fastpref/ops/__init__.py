"""Primitives: hidden states and a head in, per-token numbers out, never the logits."""

from fastpref.ops.head import Head
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

__all__ = [
    "DivergenceWithStats",
    "Head",
    "LogpsWithStats",
    "linear_divergence",
    "linear_divergence_with_stats",
    "linear_logps",
    "linear_logps_with_stats",
    "linear_logsumexp",
    "linear_stats",
]
