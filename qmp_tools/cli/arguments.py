"""What the subcommands' parsers have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

from ..arguments import timeout
from ..host.timeout import DEFAULT_TIMEOUT_S

Subcommands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a subcommand adds its parser; argparse has no public name for it."""

T = TypeVar("T")

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


def reads(read: Callable[[object], T]) -> Callable[[str], T]:
    """`read`, one of the readers of `qmp_tools.arguments`, as the type of an argument."""

    def typed(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {error}, got {text!r}") from None

    return typed


def add_timeout(parser: argparse._ActionsContainer) -> None:
    """Add ``--timeout``, which bounds each wait of a subcommand (see `host.timeout`)."""
    parser.add_argument(
        "--timeout",
        type=reads(timeout),
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="how long to wait for any one thing, such as an answer or the end of a migration "
        "(default: %(default)g)",
    )
