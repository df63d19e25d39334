"""Live migrations into a file: the source saves its whole stream, then the destination reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..procedure import HELD_BYTES_PER_S
from ..transport import EXEC, FILE
from .base import Scenario


class Exec(Scenario):
    """Shell commands save and restore the guest."""

    name = "exec"
    summary = "A shell command saves the guest into a file, and another restores it"
    transport = EXEC


class MappedRam(Scenario):
    """The guest is saved into a file in which each page has a fixed offset."""

    name = "mapped-ram"
    summary = "The guest is saved into a file, each page at a fixed offset, and restored"
    transport = FILE
    capabilities = ("mapped-ram",)
    first_pass_bytes_per_s = HELD_BYTES_PER_S


class MappedRamMultifd(Scenario):
    """The same as `MappedRam`, with several threads."""

    name = "mapped-ram-multifd"
    summary = "The same as mapped-ram, written and read by 4 threads"
    transport = FILE
    capabilities = ("mapped-ram", "multifd")
    parameters: Mapping[str, Any] = {"multifd-channels": 4}
    exercised_by = "ram.multifd-bytes"
    first_pass_bytes_per_s = HELD_BYTES_PER_S


class MappedRamDirectIo(MappedRamMultifd):
    """The same as `MappedRamMultifd`, past the page cache."""

    name = "mapped-ram-direct-io"
    summary = "The same as mapped-ram-multifd, with O_DIRECT"
    parameters: Mapping[str, Any] = {**MappedRamMultifd.parameters, "direct-io": True}
