"""Losses: sums over responses in, one number out. A method is a pure function in a file of its own.

A new method is such a file and a line below. Its signature says the rest, to trainers too: tensors
are what it reads of a batch, annotated numbers and flags are its options, and the docstring holds
their help texts.
"""

from fastpref.losses.adpa import adpa as adpa
from fastpref.losses.cpo import cpo as cpo
from fastpref.losses.dpkd import dpkd as dpkd
from fastpref.losses.dpkd import dpkd_token as dpkd_token
from fastpref.losses.dpo import dpo as dpo
from fastpref.losses.dpo import ipo as ipo
from fastpref.losses.drdo import drdo as drdo
from fastpref.losses.edpo import edpo as edpo
from fastpref.losses.kd import dckd as dckd
from fastpref.losses.kd import gkd as gkd
from fastpref.losses.kd import vanilla_kd as vanilla_kd
from fastpref.losses.kto import kto as kto
from fastpref.losses.oracle import oracle as oracle
from fastpref.losses.orpo import orpo as orpo
from fastpref.losses.pairs import METHODS as METHODS
from fastpref.losses.sft import seqkd as seqkd
from fastpref.losses.sft import sft as sft
from fastpref.losses.simpo import simpo as simpo
from fastpref.losses.tdpo import tdpo as tdpo
from fastpref.losses.tvkd import tvkd as tvkd
from fastpref.losses.wpo import wpo as wpo
