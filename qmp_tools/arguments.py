"""What a caller passes, checked at once: a wrong type would fail far from the call that passed it.

The library's arguments come as values (`require`, `path_of`, `words_of`), an option's also as text,
from a command line, a TOML file or avocado's parameters. Readers such as `positive` take both; what
they raise says what they expected, and whoever calls them names the option.
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
    """Refuse an `argument` that is not of one of the `kinds`, which are described as `expected`.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(given, kinds):
        raise UsageError(f"{argument}: expected {expected}, got {given!r} ({type(given).__name__})")


def path_of(argument: str, given: Any) -> Path:
    """The path that was given as a string or path.

    Raises:
        UsageError: it is neither.
    """
    require(argument, given, (str, os.PathLike), "a path")
    return Path(given)


def words_of(argument: str, given: Any) -> list[str]:
    """The words of a command that were given, paths among them.

    Raises:
        UsageError: it is a string, or no series of words.
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
    """The whole number from 1 on that was given.

    Raises:
        ValueError: it is not one.
    """
    number = _number(given, "a whole number from 1 on")
    if number < 1:
        raise ValueError("a whole number from 1 on")
    return number


def whole(given: object) -> int:
    """The whole number that was given.

    Raises:
        ValueError: it is not one.
    """
    return _number(given, "a whole number")


def _number(given: object, expected: str) -> int:
    try:
        return int(str(given))
    except ValueError:
        raise ValueError(expected) from None


def size(given: object) -> int:
    """The bytes that were given: a number, or text with K, M or G for powers of 1024.

    Raises:
        ValueError: it is no such size, or less than 1.
    """
    expected = "a number of bytes, or one with K, M or G, such as 64M"
    text = str(given)
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    number = _number(text[:-1] if unit else text, expected)
    if number < 1:
        raise ValueError(expected)
    return number * (unit or 1)


def seconds(given: object) -> float:
    """The time that was given, of more than 0 and less than an hour.

    Raises:
        ValueError: it is not one.
    """
    return _seconds(given, 0, 3600, "more than 0 and less than 3600 seconds")


def timeout(given: object) -> float:
    """The bound of a wait that was given, of more than 0 seconds.

    Raises:
        ValueError: it is not one.
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
