"""A matrix as avocado's recipe: a runnable for each cell, which avocado spreads over its hosts.

Each is of kind 'dmaproof' (`qmp_tools.integrations.avocado_plugins`) and carries its options with
it, so the hosts need nothing but dmaproof and QEMUs. A URI is only a name.
"""

from __future__ import annotations

from typing import Any, Final

from .axes import Matrix

KIND: Final = "dmaproof"


def runnables(matrix: Matrix) -> list[dict[str, Any]]:
    """The cells as avocado's runnables: JSON as avocado reads it."""
    return [
        {"kind": KIND, "uri": matrix.label(cell), "kwargs": dict(cell)} for cell in matrix.cells()
    ]
