"""The ``dmaproof`` command: its subcommands, and what an error's exit code is."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Final

from dmaproof.errors import UsageError, printable

from ..exit_codes import EXIT_UNTESTED, EXIT_USAGE
from ..host.unexpected import CrashError, untestable
from .interruption import interruptible
from .streams import OutputError, UnreadOutputError, guarded_streams

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
    # Only now, so that what cannot be imported is told as any other failure is.
    from . import (
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

    subcommands = (
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
    parser = argparse.ArgumentParser(
        prog="dmaproof",
        description="Proves that every page a device writes by DMA survives a live migration.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for subcommand in subcommands:
        subcommand.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, whatever happens."""
    with guarded_streams(), interruptible():
        try:
            try:
                return _run(argv)
            finally:
                sys.stdout.flush()  # a full device may take nothing of it
        except UsageError as error:
            _say(f"{error}")
            return EXIT_USAGE
        except UnreadOutputError:
            return _EXIT_UNREAD
        except (KeyboardInterrupt, asyncio.CancelledError):
            _say("interrupted; everything was cleaned up")
        except OutputError as error:
            _say(f"{error}; the outcome is not told")
        except Exception as error:
            reason = untestable(error)
            _say(f"NOT TESTED: {reason}")
            if isinstance(reason, CrashError):
                cause = reason.__cause__ or error
                _say(printable("".join(traceback.format_exception(cause)).rstrip()))
        return EXIT_UNTESTED


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    arguments.parser = parser
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _say(text: str) -> None:
    with contextlib.suppress(UnreadOutputError):  # the exit code tells it all the same
        print(f"dmaproof: {text}", file=sys.stderr)
