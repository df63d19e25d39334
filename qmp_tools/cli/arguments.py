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
    """Add the parser of `name`, one of a subcommand's own subcommands, and return it.

    Args:
        commands: where the parser is added.
        name: the word that chooses it.
        run: carries it out.
        summary: its line in the help of the parser above.
        description: see `describe`.
        epilog: see `describe`.
    """
    parser = commands.add_parser(
        name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    describe(parser, run, description=description, epilog=epilog)
    return parser


def describe(parser: argparse.ArgumentParser, run: Run, *, description: str, epilog: str) -> None:
    """Set what `parser` shows above and below its arguments, and what carries them out.

    Args:
        parser: the parser of a subcommand.
        run: takes the parsed arguments, and returns the exit code.
        description: shown above the arguments.
        epilog: shown below them, as it is written.
    """
    parser.description = description
    parser.epilog = epilog
    parser.set_defaults(run=run)


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
