"""The versions of TRL whose inner workings these trainers rely on."""

from importlib.metadata import version

from fastpref.extras import require_extra

FIRST, NEXT = "1.16", "1.17"


def require_supported_trl() -> None:
    """Refuse another TRL than the one that these trainers were tested with.

    They override methods of ``DPOTrainer`` that TRL may change with any release.
    """
    modules = ("accelerate", "datasets", "safetensors", "transformers", "trl")
    require_extra("trl", "fastpref.integrations.trl", *modules)
    from packaging.version import Version

    found = version("trl")
    if not Version(FIRST) <= Version(found) < Version(NEXT):
        raise ImportError(
            f"fastpref.integrations.trl: expected TRL {FIRST}, got {found}; "
            f"pip install 'trl>={FIRST},<{NEXT}'"
        )
