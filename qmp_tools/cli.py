"""The ``dmaproof`` command: its subcommands, and what an error's exit code is."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Final

from dmaproof.errors import DmaproofError, UsageError

from .commands import (
    bench,
    check,
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
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="dmaproof",
        description="Proves that every page a device writes by DMA survives a live migration.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for subcommand in _SUBCOMMANDS:
        subcommand.add(commands)
    arguments = parser.parse_args(argv)
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


if __name__ == "__main__":
    sys.exit(main())
