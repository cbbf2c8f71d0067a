"""The teacher's side: what it thinks of a response, as one number or at every token."""

from fastpref.data.rows import BadRow, BadRowsError, read_rows
from fastpref.teacher.actions import action_rewards
from fastpref.teacher.kd_cache import add_kd_cache
from fastpref.teacher.model import load_teacher
from fastpref.teacher.reward_columns import add_rewards
from fastpref.teacher.scoring import score
from fastpref.teacher.shaping import shaping_from_values, teacher_shaping
from fastpref.teacher.shaping_columns import add_shaping, load_shaping

__all__ = [
    "BadRow",
    "BadRowsError",
    "action_rewards",
    "add_kd_cache",
    "add_rewards",
    "add_shaping",
    "load_shaping",
    "load_teacher",
    "read_rows",
    "score",
    "shaping_from_values",
    "teacher_shaping",
]
