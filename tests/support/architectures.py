"""What a test needs to run the guests of an architecture."""

from __future__ import annotations

import os
import shutil

import pytest

from qmp_tools.arch.architecture import Architecture


def require_guests(architecture: Architecture, *, in_qemu: bool = True) -> None:
    """Skip the test if this machine cannot build the guests, or run them `in_qemu`.

    With DMAPROOF_NO_SKIP=1 the test fails instead.
    """
    programs = [architecture.compiler, *([architecture.qemu_program] if in_qemu else [])]
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}"
    if os.environ.get("DMAPROOF_NO_SKIP") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
