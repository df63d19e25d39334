"""The command line in processes of its own: completion by bash, lists, and failing outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from outside import environment, install_outside_package
from qmp_tools.cli.main import main


@pytest.fixture
def complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """Returns what bash, after it has read the script, offers for the last word of a line."""
    script = tmp_path / "dmaproof.bash"
    assert main(["completion", "bash"]) == 0
    script.write_text(capsys.readouterr().out)
    (tmp_path / "proof.json").touch()

    def offered(line: str) -> list[str]:
        # As readline does: 'complete -p' names the function, which fills COMPREPLY.
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


def test_bash_completes_subcommands_options_and_values(
    complete: Callable[[str], list[str]],
) -> None:
    subcommands = complete("dmaproof ")
    assert {"prove", "check", "doctor", "completion"} <= set(subcommands)
    assert complete("dmaproof pr") == ["prove"]
    assert complete("dmaproof prove --guest ") == ["bare", "linux"]
    assert complete("dmaproof prove --guest b") == ["bare"]
    assert complete("dmaproof qemu f") == ["fetch"]
    assert "--tracker" in complete("dmaproof prove --t")
    assert "address-queue" in complete("dmaproof prove --tracker a")
    assert complete("dmaproof list ") == [
        *("scenarios", "devices", "faults", "trackers", "iommus", "passthrough", "workload")
    ]
    assert complete("dmaproof list dev") == ["devices"]


@pytest.mark.parametrize(
    ("topic", "name"),
    [("trackers", "page-list"), ("devices", "stamped-disk"), ("faults", "deaf-pages")],
)
def test_the_lists_have_the_parts_of_other_distributions(
    tmp_path: Path, topic: str, name: str
) -> None:
    install_outside_package(tmp_path / "outside")
    command = [sys.executable, "-m", "qmp_tools.cli", "list", topic]
    done = subprocess.run(
        command,
        env=environment(tmp_path / "outside"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n{name} " in done.stdout


def test_bash_completes_file_names(complete: Callable[[str], list[str]]) -> None:
    assert complete("dmaproof prove --json pro") == ["proof.json"]
    assert complete("dmaproof check pro") == ["proof.json"]
    assert complete("dmaproof prove --fault pro") == []


def test_an_unknown_shell_is_wrong_usage() -> None:
    command = [sys.executable, "-m", "qmp_tools.cli", "completion", "sh"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_a_reader_that_closes_the_output_is_not_an_error() -> None:
    command = f"{sys.executable} -u -m qmp_tools.cli completion bash; echo $? >&2"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(["sh", "-c", command], stdout=write, stderr=subprocess.PIPE, check=True)
    os.close(write)
    assert done.stderr == b"141\n"


PRINTING = {
    "help": "--help",
    "a subcommand's help": "prove --help",
    "completion": "completion bash",
    "a matrix": "matrix --list --scenario unix",
    "a list": "list faults",
}


@pytest.mark.parametrize("words", PRINTING.values(), ids=PRINTING)
@pytest.mark.parametrize(("where", "why"), [("/dev/full", "No space left"), ("&-", "is closed")])
def test_an_output_that_cannot_be_written_to_is_reported(words: str, where: str, why: str) -> None:
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
def test_a_standard_error_that_cannot_be_written_to_does_not_change_the_exit_code(
    where: str, words: str, code: int
) -> None:
    command = f"{sys.executable} -m qmp_tools.cli {words} 2>{where}"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code
    assert "dmaproof: " not in done.stdout


def test_a_report_on_a_full_disk_is_not_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "/dev/full"]) == 3
    assert "--json /dev/full: No space left on device" in capsys.readouterr().err


def test_an_output_in_ascii_gets_escapes_for_other_characters() -> None:
    command = [sys.executable, "-m", "qmp_tools.cli", "prove", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"NAME[:OPTION=VALUE,\u2026]" in done.stdout
