"""``python -m fastpref`` is the command ``fastpref``."""

from fastpref.cli import main

main()
