"""Numbers of things in sentences."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return '1 harvest' or '2 harvests', for the `noun` 'harvest'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bytes_differ(count: int | None) -> str:
    """Return '1 byte differs' or '2 bytes differ'."""
    return "1 byte differs" if count == 1 else f"{count} bytes differ"
