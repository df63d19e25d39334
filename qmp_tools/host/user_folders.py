"""Find the user's folders for files that outlive a run (XDG base directory specification)."""

from __future__ import annotations

import os
from pathlib import Path

from dmaproof.errors import UntestableError


def cache_folder() -> Path:
    """Return the folder for files that can be made again: guests, kernels, probe results.

    Raises:
        UntestableError: this user has no home folder.
    """
    return _folder("XDG_CACHE_HOME", ".cache")


def data_folder() -> Path:
    """Return the folder for files that the user asked for: fetched QEMUs.

    Raises:
        UntestableError: this user has no home folder.
    """
    return _folder("XDG_DATA_HOME", ".local/share")


def _folder(variable: str, below_home: str) -> Path:
    base = os.environ.get(variable)
    try:
        return Path(base or Path.home() / below_home) / "dmaproof"
    except RuntimeError:
        raise UntestableError(
            f"user {os.getuid()} has no home folder: set {variable} to a folder that this user may "
            "write to"
        ) from None
