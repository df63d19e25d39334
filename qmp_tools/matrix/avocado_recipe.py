"""A matrix as an avocado recipe: one runnable for each cell, which avocado spreads over its hosts.

Each runnable is of kind 'dmaproof' (`qmp_tools.integrations.avocado_plugins`) and contains its
options, so that the hosts need only dmaproof and QEMUs. A URI serves only as a name.
"""

from __future__ import annotations

from typing import Any, Final

from .axes import Matrix

KIND: Final = "dmaproof"


def runnables(matrix: Matrix) -> list[dict[str, Any]]:
    """Return the cells as avocado's runnables, in the JSON form that avocado reads."""
    return [
        {"kind": KIND, "uri": matrix.label(cell), "kwargs": dict(cell)} for cell in matrix.cells()
    ]
