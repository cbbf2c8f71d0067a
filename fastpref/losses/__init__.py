"""Losses: per-token numbers in, one number out, each method in a file of its own."""

from fastpref.losses.drdo import DRDOOutput, drdo_loss
from fastpref.losses.oracle import OracleOutput, oracle_loss
from fastpref.losses.tvkd import TVKDOutput, tvkd_loss

__all__ = ["DRDOOutput", "OracleOutput", "TVKDOutput", "drdo_loss", "oracle_loss", "tvkd_loss"]
