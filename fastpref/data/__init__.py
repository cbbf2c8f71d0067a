"""Preference pairs: reading them, their tokens, and batches of them."""

from fastpref.data.collate import collate_pairs
from fastpref.data.rows import BadRow, BadRowsError, read_rows

__all__ = ["BadRow", "BadRowsError", "collate_pairs", "read_rows"]
