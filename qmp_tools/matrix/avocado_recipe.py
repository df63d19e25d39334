"""A matrix as an avocado recipe: one runnable for each cell, which avocado spreads over its hosts.

Each runnable is of kind 'dmaproof' (`qmp_tools.integrations.avocado_plugins`) and contains its
options, so that the hosts need only dmaproof and QEMUs. A URI serves only as a name.
"""

from __future__ import annotations

from typing import Any, Final

from dmaproof.errors import UsageError

from .axes import Matrix
from .cells import extra_axes

KIND: Final = "dmaproof"


def runnables(matrix: Matrix) -> list[dict[str, Any]]:
    """Return the cells as avocado's runnables, in the JSON form that avocado reads.

    Raises:
        UsageError: an axis is not an option of a proof.
    """
    for name in matrix.axes.keys() & extra_axes().keys():
        raise UsageError(
            f"--{name}: a recipe for avocado can have only proofs; run these cells with 'dmaproof "
            "matrix'"
        )
    return [
        {"kind": KIND, "uri": matrix.label(cell), "kwargs": dict(cell)} for cell in matrix.cells()
    ]
