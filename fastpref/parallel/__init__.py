"""Heads that are spread over processes: gathered where data is parallel, or used shard by shard."""

from fastpref.parallel.logps import vocab_parallel_logps

__all__ = ["vocab_parallel_logps"]
