"""What the parsers of the subcommands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

from ..arguments import timeout
from ..host.timeout import DEFAULT_TIMEOUT_S
from .help_formatter import HelpFormatter

Subcommands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The object to which a subcommand's parser is added; argparse has no public name for it."""

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
        commands: the object to which the parser is added.
        name: the word on the command line that chooses the parser.
        run: carries the subcommand out.
        summary: its line in the help of the parser above.
        description: see `describe`.
        epilog: see `describe`.
    """
    parser = commands.add_parser(name, help=summary, formatter_class=HelpFormatter)
    describe(parser, run, description=description, epilog=epilog)
    return parser


def describe(
    parser: argparse.ArgumentParser,
    run: Run,
    *,
    description: str,
    epilog: str,
    usage: str | None = None,
) -> None:
    """Set the help texts of `parser` and the function that carries its subcommand out.

    Args:
        parser: the parser of a subcommand.
        run: takes the parsed arguments, and returns the exit code.
        description: shown above the arguments.
        epilog: shown below the arguments, as it is written.
        usage: the arguments in the usage line; by default argparse lists all of them.
    """
    parser.description = description
    parser.epilog = epilog
    parser.usage = None if usage is None else f"%(prog)s {usage}"
    parser.set_defaults(run=run)


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield `parser` and all parsers of subcommands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers_of(below)


def reads(read: Callable[[object], T]) -> Callable[[str], T]:
    """Return a reader of `qmp_tools.arguments` as the type of an argument."""

    def typed(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {error}, got {text!r}") from None

    return typed


def qemu_address(text: str) -> str:
    """Return the address of a QEMU: the path of a socket, or a URI, which is not a valid Path."""
    return text


def add_qemu(
    parser: argparse._ActionsContainer, argument: str, whose: str, *, or_snapshot: bool = False
) -> None:
    """Add an `argument` that names a QEMU, or also a snapshot of it; `whose` describes the QEMU."""
    uri = "URI of its libvirt domain (qemu:///system/NAME)"
    others = f", {uri}, or a snapshot of it" if or_snapshot else f", or {uri}"
    parser.add_argument(argument, type=qemu_address, help=f"QMP socket of {whose}{others}")


def add_timeout(parser: argparse._ActionsContainer) -> None:
    """Add ``--timeout``, which bounds each wait of a subcommand (see `host.timeout`)."""
    parser.add_argument(
        "--timeout",
        type=reads(timeout),
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="longest single wait, such as for an answer of QEMU (default: %(default)g)",
    )


def add_quiet(parser: argparse._ActionsContainer) -> None:
    """Add ``--quiet``."""
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def add_keep(parser: argparse._ActionsContainer) -> None:
    """Add ``--keep``."""
    parser.add_argument(
        "--keep", action="store_true", help="keep the run's folder and print its path"
    )
