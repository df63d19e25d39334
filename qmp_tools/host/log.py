"""What the packages log, handed to a handler.

What they tell people while they work, they log: steps as INFO, what a person should act on as
WARNING. The loggers are called after the modules. Nothing is printed until an application
configures logging, as the command line does with `logging_to`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

_PACKAGES: Final = ("qmp_tools", "dmaproof")


@contextlib.contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Have `handler` take all that the packages log from INFO on, for as long as the context lasts.

    The handler is closed afterwards.
    """
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
