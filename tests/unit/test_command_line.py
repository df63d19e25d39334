"""The command line as a whole: its help, its lists, and the completion scripts for shells."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest

import dmaproof
from dmaproof.devices import emulated_devices
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.faults import known_faults
from qmp_tools.arch import ARCHITECTURES
from qmp_tools.cli.arguments import parsers_of
from qmp_tools.cli.list import TOPICS
from qmp_tools.cli.main import main, make_parser
from qmp_tools.guest.workload import MEANINGS, Workload, values_of
from qmp_tools.migration.scenarios import known_scenarios
from qmp_tools.proof.options import OPTIONS

ROOT = Path(__file__).parents[2]
PARSERS = {parser.prog: parser for parser in parsers_of(make_parser())}

IOMMUS = {name: iommu for each in ARCHITECTURES.values() for name, iommu in each.iommus.items()}


@pytest.mark.parametrize("name", PARSERS)
def test_the_help_has_examples_that_the_parser_accepts(name: str) -> None:
    text = PARSERS[name].format_help()
    assert "\nexamples:\n" in text
    examples = text.partition("\nexamples:\n")[2].partition("\n\n")[0].splitlines()
    commands = [line.strip() for line in examples if line.startswith("  dmaproof ")]
    assert commands
    for command in commands:
        words = shlex.split(re.split(r"  |[|>]", command)[0])
        if words[-1] != "--help":
            make_parser().parse_args(words[1:])


@pytest.mark.parametrize("name", PARSERS)
def test_the_help_describes_the_command_and_each_argument(name: str) -> None:
    parser = PARSERS[name]
    assert parser.description
    arguments = [
        action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)
    ]
    assert [argument.dest for argument in arguments if not argument.help] == []


def test_the_help_of_prove_fits_two_screens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = PARSERS["dmaproof prove"].format_help().splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > 80] == []


def test_the_help_of_prove_names_the_default_of_each_option_with_a_value() -> None:
    options = {action.dest: action for action in PARSERS["dmaproof prove"]._actions}
    with_value = [option.name for option in OPTIONS.values() if not option.is_switch]
    assert [name for name in with_value if "(default: " not in str(options[name].help)] == []


def entries(topic: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """What ``dmaproof list`` has of a topic, as JSON."""
    assert main(["list", *filter(None, [topic]), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["topic"] == (topic or None)
    found: list[dict[str, str]] = report["entries"]
    return found


@pytest.mark.parametrize(
    ("topic", "names"),
    [
        ("", TOPICS),
        ("scenarios", known_scenarios()),
        ("faults", known_faults()),
        ("trackers", emulated_trackers()),
        ("iommus", IOMMUS),
        ("workload", [field.name for field in fields(Workload)]),
    ],
)
def test_a_list_names_everything_that_a_proof_can_be_made_of(
    topic: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    listed = entries(topic, capsys)
    assert [next(iter(entry.values())) for entry in listed] == list(names)
    assert all([*entry.values()][-1] for entry in listed)


def test_the_list_of_devices_has_those_of_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    options = {entry["device"]: entry["options"] for entry in reversed(entries("devices", capsys))}
    assert {*emulated_devices(), "qemu:nvme", "fs", "vfio-fake"} <= options.keys()
    assert options["blk"] == "file=PATH"
    assert options["fs"] == "with --device-command"


def test_the_list_of_faults_names_value_link_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    faults = {entry.pop("fault"): entry for entry in entries("faults", capsys)}
    assert faults["drop-pages"]["value"] == known_faults()["drop-pages"].value_means
    assert faults["drop-pages"]["default"] == "0.01"
    assert faults["drop-pages"]["link"] == "log"
    assert faults["forgotten-at-restart"]["needs"] == "--harvest final, --kill-device"


def test_a_list_has_one_aligned_line_for_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "iommus"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(IOMMUS)
    column = lines[0].index("summary")
    assert [line[column:] for line in lines[1:]] == [iommu.summary for iommu in IOMMUS.values()]


def test_each_parameter_of_the_workload_has_a_meaning_and_values() -> None:
    names = [field.name for field in fields(Workload)]
    assert list(MEANINGS) == names
    assert all(values_of(name) for name in names)
    assert values_of("pattern") == "random, sequential, hot-set"
    assert values_of("max_pages") == "1 to 16"


def test_the_help_is_complete_before_any_subcommand_is_imported() -> None:
    assert make_parser(()).format_help() == make_parser().format_help()
    assert all(
        words.split()[1] in make_parser(()).format_help() for words in PARSERS if " " in words
    )


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"dmaproof {metadata.version('dmaproof')}\n"


def test_the_version_of_an_uninstalled_source_tree_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(vars(dmaproof), "__version__", raising=False)
    monkeypatch.setattr(metadata.MetadataPathFinder, "find_distributions", lambda *_: iter(()))
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == "dmaproof 0+unknown\n"


def test_the_version_is_that_of_meson_build() -> None:
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
    assert "workload" in script.replace("--workload", "")  # a topic of 'dmaproof list'


@pytest.mark.parametrize("way", ["cpr-exec", "background-snapshot"])
def test_a_downtime_that_dmaproof_causes_itself_cannot_be_limited(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", f"--scenario={way}", "--max-downtime=1"]) == 2
    assert "dmaproof itself pauses the guest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "device",
    [["--device=qemu:e1000"], ["--device=fs", "--device-command=virtiofsd --socket={socket}"]],
)
def test_only_a_disk_can_be_hotplugged(
    device: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", "--scenario=device-hotplug", *device]) == 2
    assert "--scenario device-hotplug needs a disk, and " in capsys.readouterr().err


@pytest.mark.parametrize("device", ["blk", "vfio-fake", "vfio:0000:3b:00.2,0000:3b:00.3"])
@pytest.mark.parametrize(
    "limit", ["--downtime-limit=0.0009", "--downtime-limit=2001", "--downtime-limit=nan"]
)
def test_a_downtime_limit_with_which_no_migration_can_end_is_wrong_usage(
    device: str, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", "--device", device, limit]) == 2
    assert "--downtime-limit: expected 0.001 to 2000 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["prove", "soak", "faults", "check a b", "watch a", "dirty-rate a"]
)
@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_timeout_that_bounds_no_wait_is_wrong_usage(
    command: str, timeout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*command.split(), f"--timeout={timeout}"])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    assert "--timeout: expected more than 0 seconds" in capsys.readouterr().err
