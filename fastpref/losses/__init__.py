"""Losses: sums over responses in, one number out. A method is a pure function in a file of its own.

A new method is such a file and a line below. Its signature says the rest, to trainers too: tensors
are what it reads of a batch, annotated numbers and flags are its options, and the docstring holds
their help texts.
"""

from fastpref.losses.dpo import dpo as dpo
from fastpref.losses.dpo import ipo as ipo
from fastpref.losses.drdo import drdo as drdo
from fastpref.losses.oracle import oracle as oracle
from fastpref.losses.pairs import METHODS as METHODS
from fastpref.losses.simpo import simpo as simpo
from fastpref.losses.tvkd import tvkd as tvkd
