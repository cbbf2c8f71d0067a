"""What all benchmarks share, from the folder above."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import report  # noqa: E402  # it is found by the line above

describe_run, write_json = report.describe_run, report.write_json
