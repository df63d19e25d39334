"""The modules that commands import, in interpreters of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qmp_tools.cli.arguments import parsers_of
from qmp_tools.cli.main import make_parser

PARSERS = {parser.prog: parser for parser in parsers_of(make_parser())}
HEAVY = {"numpy", "rich", "qemu.qmp", "asyncio", "shtab"}


@pytest.mark.parametrize("words", ["--help", "--version", "", "no-such-command"])
def test_the_command_itself_imports_neither_its_subcommands_nor_their_modules(words: str) -> None:
    script = (
        "import sys\n"
        "from qmp_tools.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    imported = set(done.stderr.splitlines()[-1].split())
    assert "qmp_tools.cli.main" in imported
    assert imported & HEAVY == set()
    subcommands = {prog.split()[1].replace("-", "_") for prog in PARSERS if " " in prog}
    assert imported & {f"qmp_tools.cli.{name}" for name in subcommands} == set()


def test_only_the_chosen_subcommand_is_imported() -> None:
    script = (
        "import sys; from qmp_tools.cli.main import main\n"
        "main(['qemu', 'list']); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    imported = set(done.stdout.splitlines()[-1].split())
    assert "qmp_tools.cli.qemu" in imported
    assert imported & {"qmp_tools.cli.prove", "qmp_tools.cli.bench", "numpy"} == set()


def test_only_an_html_page_needs_the_template_engine() -> None:
    script = (
        "import sys\n"
        "sys.modules['jinja2'] = None\n"
        "import qmp_tools.reports.html, qmp_tools.cli.outputs\n"
        "from qmp_tools.cli.main import main\n"
        "main(['prove', '--help'])\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--report" in done.stdout
