"""Findings about prerequisites of a machine, and how to fix them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """The consequence of a finding."""

    OK = "ok"
    LIMITED = "limited"
    """A proof can run, but some features of dmaproof cannot."""
    MISSING = "missing"
    """No proof can run."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; `remedy` is a command, or a sentence if no command helps."""

    name: str
    state: State
    what: str
    remedy: str | None = None
