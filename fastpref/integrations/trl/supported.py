"""The versions of TRL whose inner workings these trainers rely on."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

FIRST, NEXT = Version("1.16"), Version("1.17")


def require_supported_trl() -> None:
    """Refuse another TRL than the one that these trainers were tested with.

    They override methods of ``DPOTrainer`` that TRL may change with any release.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = None
    if found is None or not FIRST <= Version(found) < NEXT:
        raise ImportError(
            f"fastpref.integrations.trl: expected TRL {FIRST}, got "
            f"{'none' if found is None else found}; pip install 'trl>={FIRST},<{NEXT}'"
        )
