"""Preference pairs: reading them, their tokens, and batches of them."""

from fastpref.data.collate import collate_pairs
from fastpref.data.rows import BadRow, BadRowsError, read_rows
from fastpref.data.servers import topk_of_server

__all__ = ["BadRow", "BadRowsError", "collate_pairs", "read_rows", "topk_of_server"]
