"""Primitives: hidden states and a head in, per-token numbers out, never the logits."""

from fastpref.ops.head import Head
from fastpref.ops.linear_logps import (
    LogpsWithStats,
    linear_logps,
    linear_logps_with_stats,
    linear_logsumexp,
)
from fastpref.ops.linear_stats import linear_stats

__all__ = [
    "Head",
    "LogpsWithStats",
    "linear_logps",
    "linear_logps_with_stats",
    "linear_logsumexp",
    "linear_stats",
]
