"""Primitives: hidden states and a head in, per-token numbers out, never the logits."""

from fastpref.ops.head import HeadOptions
from fastpref.ops.linear_logps import linear_logps
from fastpref.ops.linear_logsumexp import linear_logsumexp
from fastpref.ops.linear_stats import linear_stats

__all__ = ["HeadOptions", "linear_logps", "linear_logsumexp", "linear_stats"]
