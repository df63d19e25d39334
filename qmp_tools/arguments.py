"""What a caller of the library passes: an argument of another type is a `UsageError` at once.

Paths may be strings. A string in place of a list of words would be taken for its characters, and a
wrong type would fail far from the call that passed it.
"""

from __future__ import annotations

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
