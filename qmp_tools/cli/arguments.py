"""What the subcommands' parsers have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

from dmaproof.errors import UsageError

from ..host.timeout import DEFAULT_TIMEOUT_S

Subcommands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a subcommand adds its parser; argparse has no public name for it."""

Run = Callable[[argparse.Namespace], int]
"""Carries a subcommand out; returns the exit code."""


def add_parser(
    commands: Subcommands,
    name: str,
    run: Run,
    *,
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """The parser of subcommand `name`; `epilog` is shown as it is written."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """`parser` and all parsers of subcommands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers_of(below)


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


def _timeout(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 seconds")
    return value


def add_timeout(parser: argparse._ActionsContainer) -> None:
    """Add ``--timeout``, which bounds each wait of a subcommand (see `processes.timeout`)."""
    parser.add_argument(
        "--timeout",
        type=_timeout,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="how long to wait for any one thing, such as an answer or the end of a migration "
        "(default: %(default)g)",
    )


def sole_device(arguments: argparse.Namespace, begins: str) -> str | None:
    """The device that was asked for, if its name `begins` so.

    Raises:
        UsageError: there are others beside it.
    """
    names: list[str] = arguments.device or []
    wanted = next((name for name in names if name.startswith(begins)), None)
    if wanted is not None and len(names) > 1:
        raise UsageError(f"--device {wanted}: a proof can have no other device beside it")
    return wanted
