"""``dmaproof watch``: the progress of any migration."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dmaproof.errors import UntestableError, printable

from ..arguments import seconds
from ..migration.watch import View, watch
from ..qemu.opening import open_qemu
from .arguments import add_qemu, add_timeout, describe, reads
from .interruption import run_interruptibly

_EXAMPLES: Final = """\
The command waits for a migration if none has begun, and ends when the migration ends. A QMP socket
serves one client at a time, so give QEMU a second one for this command.

examples:
  dmaproof watch /run/qmp2.sock
  dmaproof watch /run/qmp2.sock --interval 5 | tee migration.log
  dmaproof watch qemu:///system/vm

exit codes:
  0  the migration completed
  2  wrong usage
  3  the migration did not complete; the message says why
"""


def table(view: View) -> Table:
    """Return the view for a terminal: a bar of what has been sent, and the figures."""
    grid = Table.grid(padding=(0, 2))
    total, remaining = view.progress.total, view.progress.remaining
    if total and remaining is not None:
        grid.add_row("precopy", ProgressBar(total, max(0, total - remaining), width=40))
    for name, value in view.columns().items():
        grid.add_row(name, value)
    return grid


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[View], None]]:
    """Yield a function that shows a view: as a table on a terminal, as a line elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield lambda view: print(printable(view.line), flush=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda view: live.update(table(view), refresh=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Show the progress of a migration: passes over the RAM, rates, expected end.",
        epilog=_EXAMPLES,
    )
    add_qemu(parser, "qemu", "the source QEMU")
    parser.add_argument(
        "--interval",
        type=reads(seconds),
        default=0.5,
        metavar="SECONDS",
        help="time between two queries (default: %(default)s)",
    )
    add_timeout(parser)


async def _watch(arguments: argparse.Namespace) -> View:
    async with open_qemu("QEMU", arguments.qemu, timeout_s=arguments.timeout) as qemu:
        waiting = False
        with _screen() as show:
            async for view in watch(qemu, arguments.interval):
                if view.progress.status == "none":
                    if not waiting:
                        print("no migration yet; waiting for one", file=sys.stderr, flush=True)
                    waiting = True
                    continue
                show(view)
    if view.ended_by_libvirt:
        print("the migration completed; libvirt ended the source", file=sys.stderr)
    return view


def _run(arguments: argparse.Namespace) -> int:
    progress = run_interruptibly(_watch(arguments)).progress
    if progress.status != "completed":
        why = progress.error or "QEMU gave no reason"
        raise UntestableError(f"the migration {progress.status}: {why}")
    return 0
