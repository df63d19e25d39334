"""``dmaproof qemu``: the QEMU builds in a private folder."""

from __future__ import annotations

import argparse
import sys

from ..display import display
from ..host import qemu_builds
from .arguments import Subcommands


def add(commands: Subcommands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("qemu", help="QEMU builds in a private folder")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    fetch = actions.add_parser(
        "fetch",
        help="bring a QEMU from the distribution's archive, without root",
        description="Unpack a QEMU with all its libraries into a private folder. Nothing of the "
        "system is touched.",
    )
    fetch.add_argument("build", metavar="VERSION|SUITE", help="such as 11.1, or trixie-backports")
    fetch.set_defaults(run=_fetch)
    show = actions.add_parser("list", help="the QEMUs that are there")
    show.set_defaults(run=_list)


def _fetch(arguments: argparse.Namespace) -> int:
    build = qemu_builds.fetch(arguments.build, display().say)
    print(f"QEMU {build.version} ({build.suite}): {build.path}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    builds = qemu_builds.installed()
    for build in builds:
        print(f"{build.version}\t{build.suite}\t{build.path}")
    if not builds:
        print("none was fetched yet: dmaproof qemu fetch 11.1", file=sys.stderr)
    return 0
