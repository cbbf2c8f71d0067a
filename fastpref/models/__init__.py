"""What fastpref has to know of a transformers model: its head, and a reward head beside it."""

from fastpref.models.fused_head import add_fused_head
from fastpref.models.lm_head import head_states, lm_head_of
from fastpref.models.reward_head import add_reward_head, load_reward_head

__all__ = [
    "add_fused_head",
    "add_reward_head",
    "head_states",
    "lm_head_of",
    "load_reward_head",
]
