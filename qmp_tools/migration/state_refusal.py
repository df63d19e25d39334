"""The destination's refusal of a device's state: a migration that failed after all of RAM arrived.

QEMU loads the state of RAM first and that of the devices after it. Where it refuses a device's
state, such as a ring whose indices contradict each other (virtio_load), it ends. Its RAM is still
worth comparing: what the device lost on the way may be why its state cannot be loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from dmaproof.errors import UntestableError

from ..host.process import Process

CANNOT_LOAD: Final = "error while loading state"
"""QEMU's words for a device's state that it refuses (vmstate_load)."""
_REFUSED: Final = re.compile(f"{CANNOT_LOAD} for instance \\S+ of device '(?!ram')")
"""The same, but for the state of RAM. A QEMU that ended for it reports it in no other way."""


@dataclass(frozen=True)
class StateRefusal:
    """What is known of a refusal.

    `error` is what the migration came to, and `words` how the destination ended, with the last
    lines of its log. With `source_continued` the source ran its guest again before dmaproof could
    pause it, so that its RAM is not that of the migration's end any more.
    """

    error: UntestableError
    words: str
    source_continued: bool


def has_refused_state(destination: Process) -> bool:
    """Whether the destination has ended because it could not load a device's state."""
    return destination.died.done() and _REFUSED.search(destination.log_tail()) is not None


def last_words(destination: Process) -> str:
    """How the destination has ended, and the last lines of its log."""
    tail = destination.log_tail()
    return f"{destination.name} {destination.how_it_ended()}\n{tail}".rstrip()
