"""Where dmaproof keeps what outlives a run: the folders of the XDG base directory specification."""

from __future__ import annotations

import os
from pathlib import Path

from dmaproof.errors import UntestableError


def cache_folder() -> Path:
    """For what can be made again: guests, kernels, answers of probes.

    Raises:
        UntestableError: this user has no such folder.
    """
    return _folder("XDG_CACHE_HOME", ".cache")


def data_folder() -> Path:
    """For what was asked for: QEMUs that were fetched.

    Raises:
        UntestableError: this user has no such folder.
    """
    return _folder("XDG_DATA_HOME", ".local/share")


def _folder(variable: str, below_home: str) -> Path:
    base = os.environ.get(variable)
    try:
        return Path(base or Path.home() / below_home) / "dmaproof"
    except RuntimeError:
        raise UntestableError(
            f"user {os.getuid()} has no home folder: set {variable} to a folder that this user can "
            "write to"
        ) from None
