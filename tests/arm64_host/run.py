"""Run dmaproof's tests and a proof on an emulated arm64 machine; README.md describes it."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from arm64_host.kernel import PAGES, kernel_of
from arm64_host.machine import run_machine
from arm64_host.system import ROOT, system_image
from dmaproof.errors import UntestableError
from qmp_tools.host.run_folder import run_folder

TIMEOUT_MINUTES: Final = 240.0
DEFAULT_COMMAND: Final = Path(__file__).with_name("default.sh")


def main() -> int:
    """Build what is missing, boot the machine, and return the exit code of the command in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", choices=PAGES, default="4K", help="size of the kernel's pages")
    parser.add_argument(
        "--timeout-minutes", type=float, default=TIMEOUT_MINUTES, metavar="N",
        help="limit of the whole run (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "command", nargs="*", help="a command to run instead, in the folder of the checkout"
    )
    arguments = parser.parse_args()
    command = shlex.join(arguments.command) or DEFAULT_COMMAND.read_text()
    try:
        system, kernel = system_image(), kernel_of(arguments.pages)
        with run_folder() as folder:
            files = folder / "files.tar"
            _pack(files, command)
            return run_machine(
                kernel, system, files, folder, arguments.timeout_minutes * 60, _print
            )
    except UntestableError as error:
        print(f"arm64 host: {error}", file=sys.stderr)
        return 3


def _pack(target: Path, command: str) -> None:
    """Pack the files that git has or that are about to be added, and the script `command`."""
    options = ("-z", "--cached", "--others", "--exclude-standard")
    listing: list[str | Path] = ["git", "-C", ROOT, "ls-files", *options]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    with tarfile.open(target, "w") as archive:
        for name in filter(None, names.split("\0")):
            if (ROOT / name).exists():  # not deleted
                archive.add(ROOT / name, f"dmaproof/{name}")
        script = tarfile.TarInfo("command")
        script.size = len(command.encode())
        archive.addfile(script, io.BytesIO(command.encode()))


def _print(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
