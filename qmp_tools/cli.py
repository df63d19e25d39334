"""The ``dmaproof`` command: its subcommands, and what an error's exit code is."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Final

from dmaproof.errors import DmaproofError, UsageError

from .commands import (
    bench,
    check,
    completion,
    dirty_rate,
    doctor,
    faults,
    matrix,
    passthrough,
    prove,
    qemu,
    soak,
    watch,
)
from .verdict import EXIT_UNTESTED, EXIT_USAGE

_SUBCOMMANDS: Final = (
    prove,
    soak,
    matrix,
    passthrough,
    faults,
    check,
    watch,
    dirty_rate,
    qemu,
    doctor,
    bench,
    completion,
)

_EXIT_UNREAD: Final = 128 + signal.SIGPIPE
"""What a shell calls a program that SIGPIPE ended."""

_EXAMPLES: Final = """\
examples:
  dmaproof doctor                    what this machine lacks, and what mends it
  dmaproof prove --guest bare        one proof, in a few seconds
  dmaproof prove --help              each command's help has examples of its own
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="dmaproof",
        description="Proves that every page a device writes by DMA survives a live migration.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for subcommand in _SUBCOMMANDS:
        subcommand.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    arguments.parser = parser
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except UsageError as error:
        print(f"dmaproof: {error}", file=sys.stderr)
        return EXIT_USAGE
    except DmaproofError as error:
        print(f"dmaproof: NOT TESTED: {error}", file=sys.stderr)
        return EXIT_UNTESTED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("dmaproof: interrupted; everything was cleaned up", file=sys.stderr)
        return EXIT_UNTESTED
    except BrokenPipeError:  # whoever read the output has seen enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_UNREAD


if __name__ == "__main__":
    sys.exit(main())
