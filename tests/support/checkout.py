"""The files of this checkout that git has, or that are about to be added."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[2]


def _names() -> list[str]:
    options = ("-z", "--cached", "--others", "--exclude-standard")
    listing: list[str | Path] = ["git", "-C", _ROOT, "ls-files", *options]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if (_ROOT / name).is_file()]  # not deleted


def check_out(target: Path) -> None:
    """Copy the files into the folder `target`."""
    for name in _names():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_ROOT / name, target / name)


def digest() -> str:
    """Return a digest of the files."""
    whole = hashlib.sha256()
    for name in sorted(_names()):
        whole.update(f"{name}\0".encode() + hashlib.sha256((_ROOT / name).read_bytes()).digest())
    return whole.hexdigest()
