"""Scenarios by name: ours, and those of other packages, which are imported only when asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import pytest

from dmaproof.errors import UsageError
from qmp_tools.migration.scenarios import GROUP, Scenarios, find_scenario, known_scenarios

MODULE = """
from qmp_tools.migration.scenarios.base import Scenario

class Precious(Scenario):
    name = "precious"
    summary = "sent with care"
    capabilities = ("return-path",)

one = Precious()
NOT_A_SCENARIO = "precious"
"""

Install = Callable[..., Scenarios]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs packages, each with an entry point; returns the scenarios that there are then."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "precious_module", raising=False)
    (tmp_path / "precious_module.py").write_text(MODULE)

    def installed(**entries: str) -> Scenarios:
        for package, entry in entries.items():
            info = tmp_path / f"{package}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
            )
            (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")
        found = distributions(path=[str(tmp_path)])
        return Scenarios(point for each in found for point in each.entry_points)

    return installed


@pytest.mark.parametrize("value", ["precious_module:Precious", "precious_module:one"])
def test_another_package_has_a_scenario_as_class_or_instance(install: Install, value: str) -> None:
    scenarios = install(fine=f"precious = {value}")
    assert scenarios["precious"].summary == "sent with care"
    assert set(scenarios) - set(Scenarios()) == {"precious"}
    assert len(scenarios) == len(list(scenarios))


def test_another_package_is_not_imported_to_list_its_scenario(install: Install) -> None:
    scenarios = install(fine="precious = precious_module:Precious")
    assert "precious" in list(scenarios)
    assert "precious" in scenarios
    assert scenarios.summary("precious") == "of package fine"
    assert "precious_module" not in sys.modules
    assert scenarios["precious"].name == "precious"
    assert "precious_module" in sys.modules


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("precious = precious_module:NOT_A_SCENARIO", "fine is not a Scenario"),
        ("precious = precious_module:Gone", "fine cannot be loaded: .*Gone"),
        ("precious = no_such_module:Precious", "fine cannot be loaded: .*no_such_module"),
        ("cheap = precious_module:Precious", "fine is a scenario of another name: 'precious'"),
    ],
)
def test_what_is_not_a_scenario_of_that_name_is_wrong_usage(
    install: Install, entry: str, message: str
) -> None:
    scenarios = install(fine=entry)
    with pytest.raises(UsageError, match=message):
        scenarios[entry.partition(" ")[0]]
    assert scenarios["unix"].name == "unix"


def test_a_name_of_ours_is_not_taken_by_another_package(install: Install) -> None:
    scenarios = install(fine="unix = precious_module:Precious")
    with pytest.raises(UsageError, match="'unix': packages dmaproof and fine each have one"):
        scenarios["unix"]
    assert scenarios["tcp"].name == "tcp"
    assert len(list(scenarios)) == len(scenarios) == len(Scenarios())


def test_a_name_of_two_other_packages_is_wrong_usage(install: Install) -> None:
    entry = "precious = precious_module:Precious"
    scenarios = install(fine=entry, noble=entry)
    with pytest.raises(UsageError, match=r"packages (fine and noble|noble and fine) each have one"):
        scenarios["precious"]


def test_an_unknown_name_is_told_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"'pigeon': expected one of .*unix"):
        find_scenario("pigeon")


def test_every_scenario_of_ours_has_a_name_and_a_summary() -> None:
    for name, scenario in known_scenarios().items():
        assert scenario.name == name
        assert scenario.summary
