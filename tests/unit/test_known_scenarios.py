"""Scenarios and kinds of device by name: dmaproof's, and those of other distributions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmaproof.errors import UsageError
from qmp_tools.devices.registry import device_kinds, kind_of
from qmp_tools.migration.scenarios import find_scenario, known_scenarios

MODULE = """
from qmp_tools.devices.registry import DeviceKind
from qmp_tools.migration.scenarios.base import Scenario

class Precious(Scenario):
    name = "precious"
    summary = "sent with care"

class Tape(DeviceKind):
    name = "tape"
    accepts = frozenset({"device"})

    def names(self):
        return ["tape:SPOOL"]

    def claims(self, name):
        return name.startswith("tape:")

    def make(self, request):
        raise NotImplementedError

NOT_A_SCENARIO = "precious"
"""

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a distribution 'fine' with one entry point in a group."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "precious_module", raising=False)
    (tmp_path / "precious_module.py").write_text(MODULE)

    def forget() -> None:
        known_scenarios.cache_clear()
        device_kinds.cache_clear()

    def installed(group: str, entry: str) -> None:
        info = tmp_path / "fine-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fine\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[dmaproof.{group}]\n{entry}\n")
        forget()

    yield installed
    forget()


def test_a_scenario_of_another_distribution_is_found(install: Install) -> None:
    install("scenarios", "precious = precious_module:Precious")
    assert "precious" in known_scenarios()
    assert "precious_module" not in sys.modules, "its names must not import it"
    assert find_scenario("precious").summary == "sent with care"


def test_a_device_kind_of_another_distribution_is_found(install: Install) -> None:
    install("device_kinds", "tape = precious_module:Tape")
    assert kind_of(["tape:1"], None).names() == ["tape:SPOOL"]
    with pytest.raises(UsageError, match="tape:SPOOL"):
        kind_of(["no-such"], None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("precious = precious_module:NOT_A_SCENARIO", "'fine'.* is not a subclass of qmp_tools.Sc"),
        ("precious = no_such_module:Precious", "'fine'.* cannot be loaded: .*no_such_module"),
        ("cheap = precious_module:Precious", "'fine'.* has the attribute 'name' 'precious'"),
        ("unix = precious_module:Precious", "'unix' is ambiguous: dmaproof itself and .*'fine'"),
    ],
)
def test_an_entry_point_that_is_not_a_scenario_of_its_name_is_wrong_usage(
    install: Install, entry: str, message: str
) -> None:
    install("scenarios", entry)
    with pytest.raises(UsageError, match=message):
        find_scenario(entry.partition(" ")[0])
    assert find_scenario("tcp").name == "tcp"


def test_a_kind_that_cannot_be_loaded_does_not_affect_the_others(install: Install) -> None:
    install("device_kinds", "tape = no_such_module:Tape")
    assert kind_of(["blk"], None).several


def test_an_unknown_name_is_refused_with_the_known_names() -> None:
    with pytest.raises(UsageError, match=r"'pigeon' is not known; choose one of: .*unix"):
        find_scenario("pigeon")


def test_every_scenario_has_its_name_and_a_summary() -> None:
    for name in known_scenarios():
        scenario = find_scenario(name)
        assert scenario.name == name
        assert scenario.summary
