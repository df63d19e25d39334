"""The commands that README and docs/*.md show to their readers.

A block of commands is an indented block, or a fence of kind ``console`` (prompts and output) or
``sh``, whose first line begins with a program. A comment above each block, which readers do not
see, says how it is tested:

- ``<!-- run -->``: the block is run and must succeed; with ``<!-- run: exit code 1 -->`` its last
  command must end with that exit code;
- ``<!-- parsed: WHY -->``: running it costs too much, so only dmaproof's command lines are parsed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt

from dmaproof.errors import UsageError
from qmp_tools.cli.main import make_parser
from qmp_tools.host.user_folders import cache_folder

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

_PROGRAM: Final = re.compile(
    r"(\$ |(\./dmaproof|dmaproof|avocado|pytest|pipx?|python3?|qemu-system-x86_64|sudo|apt-get|git"
    r"|cd|export|source|meson|make|sphinx-build)(?= |$))"
)
_MARK: Final = re.compile(
    r"<!-- (?:(?P<run>run)(?:: exit code (?P<code>\d+))?|parsed: (?P<why>[^>]+)) -->\s*"
)


@dataclass(frozen=True)
class Block:
    """A block of commands: what to type, what is printed, and the comment above it."""

    page: Path
    line: int
    script: str
    printed: list[str]
    mark: re.Match[str] | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether the block is run."""
        return self.mark is not None and self.mark["run"] is not None

    @property
    def exit_code(self) -> int:
        """The exit code with which its last command must end."""
        return int(self.mark["code"] or 0) if self.mark is not None else 0

    def command_lines(self) -> Iterator[list[str]]:
        """Yield dmaproof's command lines in the block, see `commands_in`."""
        for line in self.script.replace("\\\n", " ").splitlines():
            yield from commands_in(line)


def commands_in(line: str) -> Iterator[list[str]]:
    """Yield dmaproof's command lines in a line of shell, as words without ``dmaproof`` itself."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;<>"):
            if command and command[0].removeprefix("./") == "dmaproof":
                yield command[1:]
            command = []
        else:
            command.append(word)


def blocks(page: Path) -> list[Block]:
    """Return the blocks of commands on a page."""
    found = []
    mark = None
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "html_block":
            mark = _MARK.fullmatch(token.content)
            continue
        if token.type in ("code_block", "fence") and token.info in ("", "console", "sh"):
            lines = token.content.rstrip("\n").splitlines()
            if lines and _PROGRAM.match(lines[0]):
                console = token.info == "console"
                typed = [line for line in lines if line.startswith("$ ") or not console]
                printed = [line for line in lines if line and line not in typed]
                script = "\n".join(line.removeprefix("$ ") for line in typed)
                line = token.map[0] + 1 if token.map else 0
                found.append(Block(page, line, script, printed, mark))
        mark = None
    return found


def all_blocks() -> list[Block]:
    """Return the blocks of commands of all pages."""
    return [block for page in PAGES for block in blocks(page)]


def in_prose(page: Path) -> Iterator[list[str]]:
    """Yield dmaproof's command lines between backticks, as words."""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for child in token.children or ():
            if child.type == "code_inline" and re.match(r"dmaproof [a-z]", child.content):
                yield from commands_in(child.content)


def error_of(words: list[str]) -> str | None:
    """Return the parser's error message about a command line, or None."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            make_parser().parse_args(words)
        except SystemExit as end:
            return errors.getvalue() if end.code else None
        except UsageError as error:
            return str(error)
    return None


def type_in(block: Block, folder: Path, wrapper: Sequence[str] = ()) -> tuple[int, str]:
    """Type the block into a shell in `folder`; return its exit code and output.

    `wrapper` is a command to run the shell by.
    """
    script = f"cd {shlex.quote(os.fspath(folder))}\n{block.script}"  # a wrapper may change folders
    shell = subprocess.Popen(
        [*wrapper, "bash", "-e", "-o", "pipefail", "-c", script],
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(folder),
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(cache_folder().parent),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = shell.communicate(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the block's background processes
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    return shell.returncode, printed


def missing(block: Block, printed: str) -> list[str]:
    """Return the lines that the page shows and the block did not print in this order.

    Numbers may differ; … stands for any text.
    """
    lines = iter(printed.splitlines())
    absent = []
    for shown in block.printed:
        parts = map(re.escape, re.split(r"…|0x[0-9a-f]+|[\d.]*\d", shown))
        pattern = re.compile(".*?".join(parts))
        if not any(pattern.fullmatch(line) for line in lines):
            absent.append(shown)
    return absent
