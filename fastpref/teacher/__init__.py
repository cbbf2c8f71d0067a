"""The teacher's side of TVKD: what it thinks of a response, as one number."""

from fastpref.data.rows import BadRow, BadRowsError, read_rows
from fastpref.teacher.actions import action_rewards
from fastpref.teacher.model import load_teacher
from fastpref.teacher.shaping import shaping_from_values, teacher_shaping
from fastpref.teacher.shaping_columns import add_shaping, load_shaping

__all__ = [
    "BadRow",
    "BadRowsError",
    "action_rewards",
    "add_shaping",
    "load_shaping",
    "load_teacher",
    "read_rows",
    "shaping_from_values",
    "teacher_shaping",
]
