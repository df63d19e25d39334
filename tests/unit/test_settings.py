"""Capabilities and parameters that a user adds to a scenario."""

from __future__ import annotations

import pytest

from dmaproof.errors import UsageError
from qmp_tools.migration.scenarios import find_scenario
from qmp_tools.migration.settings import TAKEN_CAPABILITIES, TAKEN_PARAMETERS
from qmp_tools.proof.options import ProofOptions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("multifd-channels=4", 4),
        ("direct-io=true", True),
        ("multifd-compression=zstd", "zstd"),
        ('tls-authz="7"', "7"),
        ("tls-authz=", ""),
        ("tls-authz=a=b", "a=b"),
        ("cpr-transfer-args=[1, 2]", [1, 2]),
    ],
)
def test_a_value_is_json_or_else_a_string(text: str, value: object) -> None:
    assert list(ProofOptions(parameter=[text]).parameters.values()) == [value]


def test_several_settings_are_a_list_or_a_text() -> None:
    for parameter in (["a=1", "b=x"], "a=1 b=x"):
        assert ProofOptions(parameter=parameter).parameters == {"a": 1, "b": "x"}
    for capability in (["xbzrle", "multifd"], "xbzrle multifd"):
        assert ProofOptions(capability=capability).capabilities == ("xbzrle", "multifd")


@pytest.mark.parametrize("text", ["multifd-channels", "=4", "Multifd=4", "multifd channels=4"])
def test_a_parameter_without_a_name_or_a_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--parameter: expected NAME=VALUE, such as multifd-ch"):
        ProofOptions(parameter=[text])


@pytest.mark.parametrize("name", ["", "multifd=on", "XBZRLE"])
def test_a_capability_that_is_not_a_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--capability: expected names of capabilities"):
        ProofOptions(capability=[name])


def test_a_setting_that_another_option_makes_is_refused_with_that_option() -> None:
    for name, why in TAKEN_CAPABILITIES.items():
        with pytest.raises(UsageError, match=f"--capability {name}: {why}"):
            ProofOptions(capability=name)
    for name, why in TAKEN_PARAMETERS.items():
        with pytest.raises(UsageError, match=f"--parameter {name}: {why}"):
            ProofOptions(parameter=f"{name}=1")


def test_a_users_parameter_replaces_the_scenarios() -> None:
    scenario = find_scenario("multifd-4")
    scenario.extend(("auto-converge",), {"multifd-channels": 16})
    assert scenario.capabilities == ("multifd", "auto-converge")
    assert scenario.parameters == {"multifd-channels": 16}
    other = find_scenario("multifd-4")
    assert (other.capabilities, other.parameters) == (("multifd",), {"multifd-channels": 4})


def test_a_scenario_without_settings_keeps_its_bandwidth() -> None:
    scenario, plain = find_scenario("unix"), find_scenario("unix")
    scenario.extend((), {})
    assert scenario.first_pass_bytes_per_s == plain.first_pass_bytes_per_s
    scenario.extend(("xbzrle",), {})
    assert scenario.first_pass_bytes_per_s < plain.first_pass_bytes_per_s
