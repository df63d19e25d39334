"""``dmaproof completion``: scripts by which shells complete dmaproof's command lines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import shtab

from .arguments import describe, parsers_of, qemu_address
from .main import make_parser

_SHELLS: Final = ("bash", "zsh", "fish")

_EXAMPLES: Final = """\
examples:
  dmaproof completion bash > ~/.local/share/bash-completion/completions/dmaproof
  dmaproof completion zsh > ~/.zfunc/_dmaproof      # with fpath+=~/.zfunc before compinit
  dmaproof completion fish > ~/.config/fish/completions/dmaproof.fish
  source <(dmaproof completion bash)                # for this shell only

exit codes:
  0  the script was printed
  2  wrong usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Print a script that makes a shell complete dmaproof's subcommands, options "
        "and values.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("shell", choices=_SHELLS, help="the shell that is to read the script")


def _run(arguments: argparse.Namespace) -> int:
    whole = make_parser()
    for parser in parsers_of(whole):
        for action in parser._actions:
            if action.type in (Path, qemu_address) or str(action.metavar).startswith(
                ("FILE", "PATH")
            ):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, arguments.shell))
    return 0
