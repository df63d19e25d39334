"""Recognize a destination that refused a device's state after all of RAM had arrived.

QEMU loads the state of RAM first and the states of the devices after it. A QEMU that refuses a
device's state, such as a ring with contradictory indices (virtio_load), ends. Its RAM is still
worth comparing: a page that the device lost may be the reason for the refusal.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Final

from dmaproof.errors import UntestableError

from ..host.process import Process

CANNOT_LOAD: Final = "error while loading state"
"""QEMU's message about a device's state that it refuses (vmstate_load)."""
_REFUSED: Final = re.compile(
    f"{CANNOT_LOAD} for instance \\S+ of device '(?!ram')"
    f"|loadvm failed during postcopy: (?:.*Failed to load vmstate|-{errno.EINVAL}: )"
)
"""The same message, except about the state of RAM; or what QEMU 11.1 prints if it refuses the state
of a device in postcopy: the thread that loads the devices marks the stream with EINVAL
(qemu_loadvm_state_main), and the thread that loads RAM may find this mark first. A QEMU that ends
for this reason only prints the message."""


@dataclass(frozen=True)
class StateRefusal:
    """A refusal of a device's state.

    `error` is the migration's error. `words` say how the destination ended, with the last lines of
    its log. If `source_continued`, the source ran its guest again before dmaproof could pause it,
    so the source's RAM has changed since the end of the migration. Unless `has_all_pages`, pages
    were still to arrive in postcopy.
    """

    error: UntestableError
    words: str
    source_continued: bool = False
    has_all_pages: bool = True


def has_refused_state(destination: Process) -> bool:
    """Return whether the destination has ended because it could not load a device's state."""
    return destination.died.done() and is_refusal(destination.log_tail())


def is_refusal(words: str) -> bool:
    """Return whether a QEMU printed these words because it could not load a device's state."""
    return _REFUSED.search(words) is not None


def last_words(destination: Process) -> str:
    """Return how the destination has ended, and the last lines of its log."""
    tail = destination.log_tail()
    return f"{destination.name} {destination.how_it_ended()}\n{tail}".rstrip()
