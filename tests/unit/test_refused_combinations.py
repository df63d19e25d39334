"""Options that a scenario or a host cannot carry out, refused before anything starts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dmaproof.errors import UnsupportedError, UsageError
from qmp_tools.cli.main import main
from qmp_tools.migration.scenarios import find_scenario
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.resolve import resolve

WITHOUT_LOG = (
    "background-snapshot",
    "cpr-exec",
    "cpr-reboot",
    "cpr-transfer",
    "ignore-shared",
)


def refusal(**options: object) -> str:
    """Return the message with which the options of a proof are refused."""
    with pytest.raises(UsageError) as caught:
        asyncio.run(resolve(ProofOptions.of(options)))
    return str(caught.value)


@pytest.mark.parametrize("name", WITHOUT_LOG)
def test_a_device_is_killed_only_in_a_precopy(name: str) -> None:
    message = refusal(scenario=name, kill_device=True)
    assert message.startswith(f"--kill-device: --scenario {name} has no precopy")


@pytest.mark.parametrize("name", WITHOUT_LOG)
def test_a_fault_without_effect_is_refused(name: str) -> None:
    message = refusal(scenario=name, fault="drop-pages=0.01")
    assert message.startswith(f"--fault drop-pages=0.01: with --scenario {name} QEMU has no dirty")


def test_a_control_without_effect_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "--control", "--scenario", "cpr-reboot"]) == 2
    assert "--control: with --scenario cpr-reboot QEMU has no dirty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["unix", "retry", "exec"])
def test_a_live_migration_takes_faults(name: str) -> None:
    find_scenario(name).require_dirty_log("--control")


def test_a_process_that_executes_its_own_qemu_again_migrates_to_no_other(tmp_path: Path) -> None:
    source, other, link = (tmp_path / name for name in ("source", "other", "link"))
    source.touch()
    other.touch()
    link.symlink_to(source)
    find_scenario("cpr-exec").require_qemus(source, link)
    find_scenario("cpr-transfer").require_qemus(source, other)
    with pytest.raises(
        UnsupportedError, match=f"--qemu-destination {other}: .* executes .* {source}"
    ):
        find_scenario("cpr-exec").require_qemus(source, other)
