"""A cached result is no longer valid after a change to a program that it depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qmp_tools.devices.command import CommandDevice, parse_command
from qmp_tools.devices.device import ProofDevice
from qmp_tools.devices.emulated import EmulatedDevice
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.devices.several import SeveralDevices
from support.setups import key, setup_of_files

CELL = {"scenario": "unix", "guest": "bare"}


@pytest.mark.parametrize(
    ("command", "changed"),
    [
        ("{folder}/backend {{socket}}", "backend"),
        ("backend {{socket}}", "backend"),  # found in PATH
        ("interpreter {folder}/backend {{socket}}", "backend"),
        ("interpreter {folder}/backend {{socket}}", "interpreter"),
        ("wrapper {{socket}}", "backend"),  # the script starts it
        ("wrapper {{socket}}", "interpreter"),  # the script's interpreter
        ("backend {{socket}} --config={folder}/config", "config"),
        ("backend {{socket}} --set file={folder}/config,queues=2", "config"),
    ],
)
@pytest.mark.parametrize("beside_another", [False, True])
def test_a_rebuilt_back_end_has_no_cached_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    changed: str,
    beside_another: bool,
) -> None:
    files = {
        "backend": "one",
        "interpreter": "one",
        "config": "one",
        "wrapper": f"#!{tmp_path}/interpreter\nexec {tmp_path}/backend $1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    device: ProofDevice = CommandDevice("blk", parse_command(command.format(folder=tmp_path)))
    if beside_another:
        device = SeveralDevices([EmulatedDevice(DeviceOptions()), device])
    current = replace(setup_of_files(tmp_path), device=device)
    first = key(CELL, current)
    (tmp_path / changed).write_text(files[changed].replace("one", "two") + "\n")
    assert key(CELL, current) != first
