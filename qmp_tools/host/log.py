"""Send the log records of the packages to a handler.

The packages log their steps as INFO, and as WARNING what a user should act on. Each module has a
logger of its name. Nothing is printed until an application configures logging, as the command line
does with `logging_to`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

_PACKAGES: Final = ("qmp_tools", "dmaproof")


@contextlib.contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Send the packages' records from INFO on to `handler`, and close it when the context ends."""
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
