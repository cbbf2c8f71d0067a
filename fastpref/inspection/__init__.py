"""Whether a teacher's signals tell chosen from rejected responses, in numbers and as a page."""

from fastpref.inspection.inspecting import Inspection, inspect_teacher, inspect_values
from fastpref.inspection.page import write_page

__all__ = ["Inspection", "inspect_teacher", "inspect_values", "write_page"]
