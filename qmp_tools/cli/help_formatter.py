"""The layout of all help texts, in a module that is fast to import."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves description and examples as they are written, and most options on a single line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)
