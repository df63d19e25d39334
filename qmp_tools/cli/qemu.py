"""``dmaproof qemu``: the QEMU builds in a private folder, fetched or built here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError

from ..arch import ARCHITECTURES, find_architecture
from ..qemu import builds as qemu_builds
from ..qemu import own_build
from .arguments import add_parser

_EXAMPLES: Final = """\
examples:
  dmaproof qemu fetch 11.1                  # the newest QEMU 11.1 that Debian has
  dmaproof qemu fetch trixie-backports      # the QEMU of that suite
  dmaproof qemu fetch 11.1 --arch aarch64   # the same for arm64 guests
  dmaproof qemu list
  dmaproof prove --qemu 11.1                # a proof with the fetched QEMU
  dmaproof qemu build 10.0 --patch fix.patch --name fixed
  dmaproof prove --qemu 10.0+fixed          # a proof with the patched QEMU
  dmaproof qemu build --source ~/qemu       # your own tree, as VERSION+own

exit codes:
  0  the QEMU was fetched or built, or the list was printed
  2  wrong usage, such as a patch that does not apply
  3  not fetched or built: the message says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    parser.description = "Fetch, build and list QEMUs in a private folder."
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
    _add_arch(fetch)
    build = add_parser(
        actions,
        "build",
        _build,
        summary="build a QEMU from source, with patches, without root",
        description="Build the distribution's QEMU with patches, or your own source tree, with the "
        "compiler and the libraries of a Debian suite, in a private folder.",
        epilog=_EXAMPLES,
    )
    build.add_argument(
        "build",
        nargs="?",
        metavar="VERSION|SUITE",
        help="version of the distribution's QEMU, such as 10.0, or suite, such as trixie; with "
        f"--source, whose compiler and libraries are used (default: {own_build.TOOLS_SUITE})",
    )
    build.add_argument(
        "--patch",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="patch to apply after the distribution's own, as 'patch -p1' does; may be repeated",
    )
    build.add_argument(
        "--source", type=Path, metavar="DIR", help="build this source tree of QEMU, incrementally"
    )
    build.add_argument(
        "--name",
        help="name of the build, which '--qemu VERSION+NAME' chooses (default: patched with "
        "--patch, own with --source, else built)",
    )
    _add_arch(build)
    add_parser(
        actions,
        "list",
        _list,
        summary="list the fetched and built QEMUs",
        description="List version, suite, guest architecture, path and patches of each QEMU that "
        "was fetched or built.",
        epilog=_EXAMPLES,
    )


def _add_arch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        choices=sorted(ARCHITECTURES),
        help="architecture of the guests (default: this machine's)",
    )


def _fetch(arguments: argparse.Namespace) -> int:
    build = qemu_builds.fetch(arguments.build, find_architecture(arguments.arch))
    print(f"QEMU {build.version} ({build.suite}): {build.path}")
    return 0


def _build(arguments: argparse.Namespace) -> int:
    architecture = find_architecture(arguments.arch)
    if arguments.source is not None:
        if arguments.patch:
            raise UsageError(
                f"--patch {arguments.patch[0]}: with --source, apply patches to your own tree"
            )
        build = own_build.build_own(arguments.source, architecture, arguments.build, arguments.name)
    elif arguments.build is not None:
        build = own_build.build_patched(
            arguments.build, architecture, arguments.patch, arguments.name
        )
    else:
        raise UsageError(
            "qemu build needs the version or suite of the distribution's QEMU, such as 10.0, or "
            "--source DIR"
        )
    print(f"QEMU {build.version} ({build.suite}): {build.path}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    builds = [
        (architecture.name, build)
        for architecture in ARCHITECTURES.values()
        for build in (
            *qemu_builds.installed(architecture),
            *qemu_builds.own_builds(architecture),
        )
    ]
    for architecture, build in builds:
        patches = f"\t{', '.join(build.patches)}" if build.patches else ""
        print(f"{build.version}\t{build.suite}\t{architecture}\t{build.path}{patches}")
    if not builds:
        print("no QEMU was fetched yet; run: dmaproof qemu fetch 11.1", file=sys.stderr)
    return 0
