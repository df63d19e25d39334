"""Live migrations into a file: the source saves all of its stream before the destination reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..procedure import HELD_BYTES_PER_S
from ..transport import EXEC, FILE
from .base import Scenario


class Exec(Scenario):
    """Saved and restored by shell commands."""

    name = "exec"
    summary = "saved by a shell command into a file, restored by another"
    transport = EXEC


class MappedRam(Scenario):
    """Saved into a file in which each page has its place."""

    name = "mapped-ram"
    summary = "saved into a file where each page has its place, then restored"
    transport = FILE
    capabilities = ("mapped-ram",)
    first_pass_bytes_per_s = HELD_BYTES_PER_S


class MappedRamMultifd(Scenario):
    """Saved likewise, by several threads."""

    name = "mapped-ram-multifd"
    summary = "the same, written and read by 4 threads"
    transport = FILE
    capabilities = ("mapped-ram", "multifd")
    parameters: Mapping[str, Any] = {"multifd-channels": 4}
    exercised_by = "ram.multifd-bytes"
    first_pass_bytes_per_s = HELD_BYTES_PER_S
