"""The ``dmaproof`` command: its subcommands, and the exit code of each error."""

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

from ..exit_codes import BISECT, BISECT_ABORT, EXIT_UNTESTED, EXIT_USAGE, for_bisect
from ..host.log import logging_to
from ..host.unexpected import CrashError, untestable
from .help_formatter import HelpFormatter
from .interruption import interruptible
from .log import StderrLog
from .streams import OutputError, UnreadOutputError, guarded_streams

_EXIT_UNREAD: Final = 128 + signal.SIGPIPE
"""The exit code by which a shell reports a program that SIGPIPE ended."""

_SUMMARIES: Final = {
    "prove": "migrate a guest under DMA load and compare every page",
    "list": "print what a proof can be made of: scenarios, devices, faults and more",
    "soak": "migrate one guest many times, and look for lost pages and leaks",
    "matrix": "carry out a proof for each combination of options",
    "passthrough": "prove the VFIO dirty tracking of the kernel and of QEMU, without hardware",
    "reproduce": "try the known defects of Linux and QEMU on a kernel or a QEMU",
    "faults": "inject every known fault, and report which were caught",
    "check": "compare all RAM of two paused QEMUs after a migration",
    "snapshot": "save a guest's RAM as digests, for a check without its QEMU",
    "watch": "show the progress of any migration",
    "dirty-rate": "measure how fast a running guest dirties its RAM",
    "qemu": "fetch and list QEMU builds in a private folder",
    "doctor": "print missing prerequisites of a proof and how to fix them",
    "bench": "measure the cost of dirty bitmaps",
    "completion": "print a script that makes your shell complete command lines",
}
"""The subcommands. Each is a module of this package of the same name, with _ instead of -."""

_EXAMPLES: Final = """\
examples:
  dmaproof doctor                # print missing prerequisites and how to fix them
  dmaproof prove --guest bare    # carry out one proof, in a few seconds
  dmaproof list                  # print what a proof can be made of
  dmaproof prove --help          # print the options of one command, with examples
"""


def make_parser(chosen: Container[str] = _SUMMARIES) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        chosen: the subcommands whose arguments the parser knows; all by default. For the
            others it has only the name and the summary, and their modules are not imported.
    """
    parser = argparse.ArgumentParser(
        prog="dmaproof",
        description="Prove that every page a device writes by DMA survives a live migration.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in _SUMMARIES.items():
        subcommand = commands.add_parser(name, help=summary, formatter_class=HelpFormatter)
        if name in chosen:
            module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
            module.add_arguments(subcommand)
    return parser


class _ShowVersion(argparse.Action):
    """Print the version; argparse's own action looks the version up for every command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"dmaproof {dmaproof.__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; it raises nothing."""
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse accepts options that are cut short.
    if not ("passthrough" in words and any(word[2:] and BISECT.startswith(word) for word in words)):
        return _exit_code(words, EXIT_UNTESTED)
    try:
        return for_bisect(_exit_code(words, BISECT_ABORT))
    except SystemExit as wrong_usage:  # of argparse, whose exit code git takes for a bad commit
        return for_bisect(wrong_usage.code if isinstance(wrong_usage.code, int) else EXIT_USAGE)


def _exit_code(words: Sequence[str], interrupted: int) -> int:
    """Run the command; the exit code `interrupted` says that something else stopped it."""
    with guarded_streams(), interruptible():
        try:
            try:
                return _run(words)
            finally:
                sys.stdout.flush()  # fails now, and not at exit, if the device is full
        except UsageError as error:
            _say(f"{error}")
            return EXIT_USAGE
        except UnreadOutputError:
            return _EXIT_UNREAD
        except KeyboardInterrupt:
            _say("interrupted; everything was cleaned up")
            return interrupted
        except OutputError as error:
            _say(f"{error}; the outcome could not be printed")
            return interrupted
        except Exception as error:
            reason = untestable(error)
            _say(f"NOT TESTED: {reason}")
            if isinstance(reason, CrashError):
                cause = reason.__cause__ or error
                _say(printable("".join(traceback.format_exception(cause)).rstrip()))
                return interrupted
        return EXIT_UNTESTED


def _run(words: Sequence[str]) -> int:
    log = StderrLog()
    with logging_to(log):
        # No option in front of the subcommand has a value, so the first other word chooses it.
        chosen = [word for word in words if not word.startswith("-")][:1]
        arguments = make_parser(chosen).parse_args(words)
        arguments.command_line = words
        arguments.log = log
        log.is_quiet = getattr(arguments, "quiet", False)
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)


def _say(text: str) -> None:
    with contextlib.suppress(UnreadOutputError):  # the exit code reports the error too
        print(f"dmaproof: {text}", file=sys.stderr)
