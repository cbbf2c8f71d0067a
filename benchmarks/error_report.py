"""Draft."""


def markdown(path: object) -> str:
    """Draft."""
    return ""


def summary(path: object) -> str:
    """Draft."""
    return ""
