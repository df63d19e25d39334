"""``dmaproof snapshot``: save what a comparison of a guest's RAM needs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError

from ..exit_codes import EXIT_PASS
from ..qemu.machine import MIB
from ..ram_check.take import take_snapshot
from .arguments import add_qemu, add_timeout, describe
from .interruption import run_interruptibly
from .main import main

_EXAMPLES: Final = """\
The file can be copied to another host, and 'dmaproof check' takes it in place of a socket.

Without --at-switchover, the guest must be paused. With it, the command waits for a migration of
the guest to complete. The guest may run until then, and a supervisor such as libvirt may end its
QEMU at the switchover.

examples:
  dmaproof snapshot /run/source-qmp.sock source.snap
  dmaproof snapshot qemu:///system/vm1 vm1.snap --at-switchover --background
  dmaproof check source.snap /run/destination-qmp.sock

exit codes:
  0  the snapshot was taken, or with --background, will be taken
  2  wrong usage
  3  no snapshot: the guest runs, the migration failed, or its memory cannot be read
"""
_HELD: Final = b"held"
_PROGRAM: Final = (
    "import sys; from qmp_tools.cli.snapshot import main_in_background; "
    "sys.exit(main_in_background())"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Save a digest of each page of a guest's RAM, so that 'dmaproof check' can\n"
        "compare the RAM without the guest's QEMU.",
        epilog=_EXAMPLES,
    )
    add_qemu(parser, "qemu", "the QEMU")
    parser.add_argument("file", type=Path, help="the file for the snapshot; it is replaced")
    parser.add_argument(
        "--at-switchover",
        action="store_true",
        help="wait for a migration of the guest to complete, for as long as QEMU runs, and take "
        "the snapshot then",
    )
    parser.add_argument(
        "--background",
        action="store_true",
        help="with --at-switchover: return as soon as the migration may begin, and take the "
        "snapshot in the background",
    )
    parser.add_argument(
        "--content",
        action="store_true",
        help="save the bytes of each page that is not zero, not only its digest",
    )
    add_timeout(parser)


def _run(arguments: argparse.Namespace) -> int:
    if str(arguments.file) == "-":
        raise UsageError("a snapshot needs the path of a file, and cannot go to standard output")
    if arguments.background:
        return _start_in_background(arguments)
    snapshot = run_interruptibly(
        take_snapshot(
            arguments.qemu,
            arguments.file,
            at_switchover=arguments.at_switchover,
            on_held=_on_held,
            with_content=arguments.content,
            timeout_s=arguments.timeout,
        )
    )
    print(f"{arguments.file}: {snapshot.ram.length // MIB} MiB of RAM of {snapshot.facts.address}")
    return EXIT_PASS


def _say_held() -> None:
    print("the memory is held; waiting for a migration to complete", file=sys.stderr, flush=True)


_on_held = _say_held
"""What this process does when the memory is held."""


def _start_in_background(arguments: argparse.Namespace) -> int:
    """Start a process that waits for the switchover; return when it holds the memory."""
    if not arguments.at_switchover:
        raise UsageError("--background needs --at-switchover")
    words = ["snapshot", arguments.qemu, str(arguments.file), "--at-switchover"]
    words += ["--timeout", str(arguments.timeout), *(["--content"] * arguments.content)]
    # Pipes, because a child of the process would keep the terminal or file of this process open.
    child = subprocess.Popen(
        # Without -P, Python would import modules from the current folder, which may be any folder.
        [sys.executable, "-P", "-c", _PROGRAM, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    with child.stdout as output, child.stderr as errors:
        if output.read(len(_HELD)) != _HELD:
            sys.stderr.write(errors.read().decode(errors="replace"))
            return child.wait()
    when = f"{arguments.file} will be complete after the migration"
    print(f"process {child.pid} holds the memory; {when}")
    return EXIT_PASS


def main_in_background() -> int:
    """Run the command in the process that ``--background`` has started."""
    global _on_held
    _on_held = _report_held
    return main()


def _report_held() -> None:
    """Tell the process that waits for it that the memory is held, and leave its terminal."""
    os.write(1, _HELD)
    with Path(os.devnull).open("r+b") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
