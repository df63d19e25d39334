"""``dmaproof completion``: what makes a shell complete dmaproof's command lines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import shtab

from .arguments import Subcommands, add_parser, parsers_of

_SHELLS: Final = ("bash", "zsh", "fish")

_EXAMPLES: Final = """\
examples:
  dmaproof completion bash > ~/.local/share/bash-completion/completions/dmaproof
  dmaproof completion zsh > ~/.zfunc/_dmaproof      with fpath+=~/.zfunc before compinit
  dmaproof completion fish > ~/.config/fish/completions/dmaproof.fish
  source <(dmaproof completion bash)                for this shell alone
"""


def add(commands: Subcommands) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        "completion",
        _run,
        summary="completion of command lines, for your shell",
        description="Print what makes a shell complete dmaproof's subcommands, options and values.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("shell", choices=_SHELLS)


def _run(arguments: argparse.Namespace) -> int:
    for parser in parsers_of(arguments.parser):
        for action in parser._actions:
            if action.type is Path or str(action.metavar).startswith(("FILE", "PATH")):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(arguments.parser, arguments.shell))
    return 0
