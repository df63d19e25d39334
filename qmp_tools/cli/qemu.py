"""``dmaproof qemu``: the QEMU builds in a private folder."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from ..arch import ARCHITECTURES, find_architecture
from ..qemu import builds as qemu_builds
from .arguments import add_parser

_EXAMPLES: Final = """\
examples:
  dmaproof qemu fetch 11.1                  # the newest QEMU 11.1 that Debian has
  dmaproof qemu fetch trixie-backports      # the QEMU of that suite
  dmaproof qemu fetch 11.1 --arch aarch64   # the same for arm64 guests
  dmaproof qemu list
  dmaproof prove --qemu 11.1                # a proof with the fetched QEMU

exit codes:
  0  the QEMU was fetched, or the list was printed
  2  wrong usage
  3  not fetched: the message says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    parser.description = "Fetch and list QEMU builds in a private folder."
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    fetch = add_parser(
        actions,
        "fetch",
        _fetch,
        summary="fetch a QEMU from the distribution's archive, without root",
        description="Fetch a QEMU with all its libraries into a private folder; the system is not "
        "changed.",
        epilog=_EXAMPLES,
    )
    fetch.add_argument(
        "build",
        metavar="VERSION|SUITE",
        help="version, such as 11.1, or suite, such as trixie-backports",
    )
    fetch.add_argument(
        "--arch",
        choices=sorted(ARCHITECTURES),
        help="architecture of the guests (default: this machine's)",
    )
    add_parser(
        actions,
        "list",
        _list,
        summary="list the fetched QEMUs",
        description="List version, suite, guest architecture and path of each fetched QEMU.",
        epilog=_EXAMPLES,
    )


def _fetch(arguments: argparse.Namespace) -> int:
    build = qemu_builds.fetch(arguments.build, find_architecture(arguments.arch))
    print(f"QEMU {build.version} ({build.suite}): {build.path}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    builds = [
        (architecture.name, build)
        for architecture in ARCHITECTURES.values()
        for build in qemu_builds.installed(architecture)
    ]
    for architecture, build in builds:
        print(f"{build.version}\t{build.suite}\t{architecture}\t{build.path}")
    if not builds:
        print("no QEMU was fetched yet; run: dmaproof qemu fetch 11.1", file=sys.stderr)
    return 0
