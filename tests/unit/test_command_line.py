"""The command line as a whole: its help, and the completion that shells get."""

from __future__ import annotations

import re
import shlex
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


@pytest.mark.parametrize(
    ("shell", "sign"), [("zsh", "#compdef dmaproof"), ("fish", "complete -c dmaproof")]
)
def test_zsh_and_fish_have_completion_scripts(
    shell: str, sign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = completion(shell, capsys)
    assert sign in script
    assert "dirty-ring" in script


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
