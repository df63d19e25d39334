"""The command line as a whole: its help, and the completion that shells get."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import dmaproof
from qmp_tools.cli.arguments import parsers_of
from qmp_tools.cli.main import main, make_parser

ROOT = Path(__file__).parents[2]
PARSERS = {parser.prog: parser for parser in parsers_of(make_parser())}


@pytest.mark.parametrize("name", PARSERS)
def test_help_has_examples_which_parse(name: str) -> None:
    text = PARSERS[name].format_help()
    assert "\nexamples:\n" in text
    examples = text.partition("\nexamples:\n")[2].partition("\n\n")[0].splitlines()
    commands = [line.strip() for line in examples if line.startswith("  dmaproof ")]
    assert commands
    for command in commands:
        words = shlex.split(re.split(r"  |[|>]", command)[0])
        if words[-1] != "--help":
            make_parser().parse_args(words[1:])


HEAVY = {"numpy", "rich", "qemu.qmp", "asyncio", "shtab"}


@pytest.mark.parametrize("words", ["--help", "--version", "", "no-such-command"])
def test_the_command_itself_imports_neither_its_subcommands_nor_what_they_need(words: str) -> None:
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


def test_a_chosen_subcommand_is_the_only_one_that_is_imported() -> None:
    script = (
        "import sys; from qmp_tools.cli.main import make_parser\n"
        "make_parser(['qemu', 'list']).parse_args(['qemu', 'list']); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    imported = set(done.stdout.split())
    assert "qmp_tools.cli.qemu" in imported
    assert imported & {"qmp_tools.cli.prove", "qmp_tools.cli.bench", "numpy"} == set()


def test_the_help_is_whole_before_any_subcommand_is_imported() -> None:
    assert make_parser(()).format_help() == make_parser().format_help()
    assert all(
        words.split()[1] in make_parser(()).format_help() for words in PARSERS if " " in words
    )


def test_the_version_is_the_installed_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"dmaproof {metadata.version('dmaproof')}\n"


def test_the_version_of_sources_that_are_not_installed_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(vars(dmaproof), "__version__", raising=False)
    monkeypatch.setattr(metadata.MetadataPathFinder, "find_distributions", lambda *_: iter(()))
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == "dmaproof 0+unknown\n"


def test_the_version_is_meson_builds() -> None:
    declared = re.search(r"^  version: '(.+)',$", (ROOT / "meson.build").read_text(), re.MULTILINE)
    assert declared
    assert metadata.version("dmaproof") == declared[1]


def completion(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """What a bash that has sourced the completion offers for the last word of a line."""
    script = tmp_path / "dmaproof.bash"
    script.write_text(completion("bash", capsys))
    (tmp_path / "proof.json").touch()

    def offered(line: str) -> list[str]:
        # What readline does: 'complete -p' tells the function, which fills COMPREPLY.
        ask = f"""
            source {script}
            read -ra COMP_WORDS <<<"$1"
            [[ "$1" != *' ' ]] || COMP_WORDS+=("")
            COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            [[ $(complete -p dmaproof) =~ -F\\ ([^ ]+) ]]
            "${{BASH_REMATCH[1]}}" dmaproof "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(
            ["bash", "--norc", "-c", ask, "bash", line],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.split()

    return offered


def test_bash_completes(complete: Callable[[str], list[str]]) -> None:
    subcommands = complete("dmaproof ")
    assert {"prove", "check", "doctor", "completion"} <= set(subcommands)
    assert complete("dmaproof pr") == ["prove"]
    assert complete("dmaproof prove --guest ") == ["bare", "linux"]
    assert complete("dmaproof prove --guest b") == ["bare"]
    assert complete("dmaproof qemu f") == ["fetch"]
    assert "--tracker" in complete("dmaproof prove --t")
    assert "address-queue" in complete("dmaproof prove --tracker a")


def test_bash_completes_files(complete: Callable[[str], list[str]]) -> None:
    assert complete("dmaproof prove --json pro") == ["proof.json"]
    assert complete("dmaproof check pro") == ["proof.json"]
    assert complete("dmaproof prove --fault pro") == []


@pytest.mark.parametrize(
    ("shell", "sign"), [("zsh", "#compdef dmaproof"), ("fish", "complete -c dmaproof")]
)
def test_other_shells(shell: str, sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = completion(shell, capsys)
    assert sign in script
    assert "dirty-ring" in script


def test_an_unknown_shell_is_wrong_usage() -> None:
    command = [sys.executable, "-m", "qmp_tools.cli", "completion", "sh"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -u -m qmp_tools.cli completion bash; echo $? >&2"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(["sh", "-c", command], stdout=write, stderr=subprocess.PIPE, check=True)
    os.close(write)
    assert done.stderr == b"141\n"


@pytest.mark.parametrize("way", ["cpr-exec", "background-snapshot"])
def test_a_downtime_of_dmaproofs_own_has_no_limit(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", f"--scenario={way}", "--max-downtime=1"]) == 2
    assert "dmaproof itself stops the guest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "device",
    [["--device=qemu:e1000"], ["--device=fs", "--device-command=virtiofsd --socket={socket}"]],
)
def test_only_a_disk_can_be_plugged_as_one(
    device: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", "--scenario=device-hotplug", *device]) == 2
    assert "--scenario device-hotplug: it plugs a disk, and " in capsys.readouterr().err


TELLING = {
    "help": "--help",
    "a subcommand's help": "prove --help",
    "completion": "completion bash",
    "list": "matrix --list --scenario unix",
}


@pytest.mark.parametrize("words", TELLING.values(), ids=TELLING)
@pytest.mark.parametrize(("where", "why"), [("/dev/full", "No space left"), ("&-", "is closed")])
def test_an_output_that_takes_nothing_is_told(words: str, where: str, why: str) -> None:
    command = f"{sys.executable} -m qmp_tools.cli {words} >{where}"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("dmaproof: standard output cannot be written to: ")
    assert why in line


@pytest.mark.parametrize("where", ["/dev/full", "&-"])
@pytest.mark.parametrize(
    ("words", "code"),
    [("completion bash", 0), ("prove --device nothing", 2), ("check /none /none", 2)],
)
def test_errors_that_cannot_be_told_change_nothing(where: str, words: str, code: int) -> None:
    command = f"{sys.executable} -m qmp_tools.cli {words} 2>{where}"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code
    assert "dmaproof: " not in done.stdout


def test_a_report_on_a_full_disk_is_no_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "/dev/full"]) == 3
    assert "--json /dev/full: No space left on device" in capsys.readouterr().err


def test_an_output_of_few_characters_gets_all_that_it_has() -> None:
    command = [sys.executable, "-m", "qmp_tools.cli", "prove", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"NAME[:OPTION=VALUE,\u2026]" in done.stdout


@pytest.mark.parametrize("device", ["blk", "vfio-fake", "vfio:0000:3b:00.2,0000:3b:00.3"])
@pytest.mark.parametrize(
    "limit", ["--downtime-limit=0.0009", "--downtime-limit=2001", "--downtime-limit=nan"]
)
def test_a_migration_that_could_never_end_is_wrong_usage(
    device: str, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", "--device", device, limit]) == 2
    assert "--downtime-limit: expected 0.001 to 2000 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["prove", "soak", "faults", "check a b", "watch a", "dirty-rate a"]
)
@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_wait_without_a_bound_is_wrong_usage(
    command: str, timeout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*command.split(), f"--timeout={timeout}"])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    assert "--timeout: expected more than 0 seconds" in capsys.readouterr().err
