"""What was found where a machine was looked at, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    LIMITED = "limited"
    """A proof can run, but not all that dmaproof can do."""
    MISSING = "missing"
    """No proof can run."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` is a command, or words where no command helps."""

    name: str
    state: State
    what: str
    remedy: str | None = None
