"""Libraries that only a part of fastpref needs, and how to get them."""

from __future__ import annotations

from importlib.util import find_spec


def require_extra(extra: str, what: str, *modules: str) -> None:
    """Refuse to go on without the libraries of an extra, and say how to install them.

    Args:
        extra: The extra of pyproject.toml that brings them.
        what: Who needs them, by its public name.
        *modules: What will be imported.

    Raises:
        ImportError: One of the modules is not installed.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{what} needs {', '.join(missing)}: pip install '.[{extra}]' in a clone of fastpref"
        )
