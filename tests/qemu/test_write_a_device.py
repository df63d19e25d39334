"""The package that docs/write-a-device.md has its readers write, with the code of the page."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from outside import install
from support.command import Outcome, Tool

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-device.md").read_text()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the package of the page where dmaproof finds it."""
    project = tomllib.loads("\n".join(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)))
    install(tmp_path, project["project"]["name"], project["project"]["entry-points"])
    modules = re.findall(r"`(my_\w+)\.py`[^`]*```python\n(.*?)```", PAGE, re.DOTALL)
    listed = project["tool"]["setuptools"]["py-modules"]
    assert [name for name, _ in modules] == [*listed, "my_fault"]  # the page adds it in words
    for name, code in modules:
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def prove(tool: Tool, guest: str, *options: str) -> Outcome:
    return tool.run("prove", "--guest", guest, "--device", "my-disk", *options, "--json", "-")


@pytest.mark.usefixtures("package")
def test_the_device_and_the_tracker_of_the_page_pass_and_a_lost_bit_is_caught(tool: Tool) -> None:
    outcome = prove(tool, "bare", "--tracker", "my-tracker", "--control")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["setup"]["device"] == "my-disk"
    assert outcome.report["setup"]["tracker"] == "my-tracker"
    assert outcome.report["sensitivity"]["guaranteed_detectable"] >= 8000


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("guest", ["bare", "linux"])
def test_the_device_of_the_page_passes_with_each_guest(tool: Tool, guest: str) -> None:
    outcome = prove(tool, guest)
    assert outcome.exit_code == 0, outcome.output + outcome.errors


@pytest.mark.usefixtures("package")
def test_the_fault_of_the_page_is_detected_at_its_link(tool: Tool) -> None:
    outcome = prove(tool, "bare", "--tracker", "my-tracker", "--fault", "my-fault")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    assert {page["link"] for page in outcome.report["lost_pages"]} == {"tracker"}
