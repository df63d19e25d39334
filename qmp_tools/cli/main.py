"""The ``dmaproof`` command: its subcommands, and what an error's exit code is."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import traceback
from collections.abc import Callable, Container, Sequence
from typing import Final

import dmaproof
from dmaproof.errors import UsageError, printable

from ..exit_codes import EXIT_UNTESTED, EXIT_USAGE
from ..host.log import logging_to
from ..host.unexpected import CrashError, untestable
from .interruption import interruptible
from .log import StderrLog
from .streams import OutputError, UnreadOutputError, guarded_streams

_EXIT_UNREAD: Final = 128 + signal.SIGPIPE
"""What a shell calls a program that SIGPIPE ended."""

_SUMMARIES: Final = {
    "prove": "migrate a guest under DMA load and compare every page",
    "soak": "migrate one guest again and again: nothing may be lost, nothing may grow",
    "matrix": "many proofs: QEMU versions, migration scenarios, devices, trackers, guests",
    "passthrough": "prove the kernel's and QEMU's VFIO dirty tracking, without hardware",
    "faults": "break every link of the chain in turn, and see whether it is caught",
    "check": "compare all RAM of two paused QEMUs after a migration",
    "watch": "live progress of any migration",
    "dirty-rate": "how fast a running guest's RAM gets dirty",
    "qemu": "QEMU builds in a private folder",
    "doctor": "what this machine has for a proof, what is missing, and how to fix it",
    "bench": "what iterator, core and kernel cost",
    "completion": "completion of command lines, for your shell",
}
"""The subcommands. Each is a module of this package, whose name has _ in the place of -."""

_EXAMPLES: Final = """\
examples:
  dmaproof doctor                    missing prerequisites and how to fix them
  dmaproof prove --guest bare        one proof, in a few seconds
  dmaproof prove --help              each command's help has examples of its own
"""


def make_parser(chosen: Container[str] = _SUMMARIES) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        chosen: the subcommands whose arguments the parser knows; all by default. It knows no more
            than name and summary of the others, and their modules are not imported.
    """
    parser = argparse.ArgumentParser(
        prog="dmaproof",
        description="Proves that every page a device writes by DMA survives a live migration.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in _SUMMARIES.items():
        subcommand = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in chosen:
            module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
            module.add_arguments(subcommand)
    return parser


class _ShowVersion(argparse.Action):
    """As argparse's own action, which has to know the version although nobody asks for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"dmaproof {dmaproof.__version__}")
        parser.exit()


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
        except KeyboardInterrupt:
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
    words = list(sys.argv[1:] if argv is None else argv)
    log = StderrLog()
    with logging_to(log):
        # A subcommand is chosen by a word of its name; another such word costs only an import.
        arguments = make_parser(words).parse_args(words)
        arguments.command_line = words
        arguments.log = log
        log.is_quiet = getattr(arguments, "quiet", False)
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)


def _say(text: str) -> None:
    with contextlib.suppress(UnreadOutputError):  # the exit code tells it all the same
        print(f"dmaproof: {text}", file=sys.stderr)
