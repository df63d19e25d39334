"""What several subcommands take on their command lines."""

from __future__ import annotations


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def size(text: str) -> int:
    """Bytes, with K, M or G for powers of 1024."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return positive(text[:-1]) * unit if unit else positive(text)


def seconds(text: str) -> float:
    """A time of more than 0 and less than an hour."""
    value = float(text)
    if not 0 < value < 3600:
        raise ValueError
    return value
