"""Checks of the arguments that a caller passes, before a wrong type fails far from the call.

The library's arguments are values: see `require`, `path_of` and `words_of`. The value of an option
may also be text, from a command line, a TOML file or avocado's parameters. Readers such as
`positive` take both. Their ValueError says what they expected, and their caller names the option.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from dmaproof.errors import UsageError

AnyPath: TypeAlias = str | os.PathLike[str]


def require(argument: str, given: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Refuse an `argument` that is not of one of the `kinds`, which `expected` describes.

    Raises:
        UsageError: the argument has the wrong type.
    """
    if not isinstance(given, kinds):
        raise UsageError(f"{argument}: expected {expected}, got {given!r} ({type(given).__name__})")


def path_of(argument: str, given: Any) -> Path:
    """Return the path that was given as a string or path.

    Raises:
        UsageError: it is neither.
    """
    require(argument, given, (str, os.PathLike), "a path")
    return Path(given)


def words_of(argument: str, given: Any) -> list[str]:
    """Return the words of a command; a word may be a path.

    Raises:
        UsageError: a single string was given, or not a list of words.
    """
    expected = "a list of words, such as ['-m', '64']"
    require(argument, given, Iterable, expected)
    if isinstance(given, (str, bytes)):
        raise UsageError(f"{argument}: expected {expected}, got the string {given!r}")
    words = list(given)
    for number, word in enumerate(words):
        require(f"{argument}[{number}]", word, (str, os.PathLike), "a word")
    return [os.fspath(word) for word in words]


def positive(given: object) -> int:
    """Return the whole number from 1 on that was given.

    Raises:
        ValueError: it is not such a number.
    """
    number = _number(given, "a whole number from 1 on")
    if number < 1:
        raise ValueError("a whole number from 1 on")
    return number


def whole(given: object) -> int:
    """Return the whole number that was given.

    Raises:
        ValueError: it is not a whole number.
    """
    return _number(given, "a whole number")


def _number(given: object, expected: str) -> int:
    try:
        return int(str(given))
    except ValueError:
        raise ValueError(expected) from None


def size(given: object) -> int:
    """Return a size in bytes: a number, or text with K, M or G for powers of 1024.

    Raises:
        ValueError: it is not such a size, or less than 1.
    """
    expected = "a number of bytes, or one with K, M or G, such as 64M"
    text = str(given)
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    number = _number(text[:-1] if unit else text, expected)
    if number < 1:
        raise ValueError(expected)
    return number * (unit or 1)


def seconds(given: object) -> float:
    """Return the time in seconds that was given: more than 0, and less than an hour.

    Raises:
        ValueError: it is not such a time.
    """
    return _seconds(given, 0, 3600, "more than 0 and less than 3600 seconds")


def timeout(given: object) -> float:
    """Return the bound of a wait in seconds that was given: more than 0.

    Raises:
        ValueError: it is not such a time.
    """
    return _seconds(given, 0, math.inf, "more than 0 seconds")


def _seconds(given: object, above: float, below: float, expected: str) -> float:
    try:
        value = float(str(given))
    except ValueError:
        raise ValueError(expected) from None
    if not above < value < below:
        raise ValueError(expected)
    return value
