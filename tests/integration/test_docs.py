"""Checks of the documentation that need other programs: syntax of its scripts, and its pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml

import dmaproof
import qmp_tools
from qmp_tools import aio
from qmp_tools.arch import ARCHITECTURES
from qmp_tools.host import distribution
from qmp_tools.integrations.pytest_plugin import pytest_addoption
from support.doc_commands import ROOT, commands_in, error_of

CI = [*(ROOT / "docs" / "ci").glob("*.yml"), *(ROOT / ".github" / "workflows").glob("*.yml")]


def scripts_of(node: object) -> Iterator[str]:
    """Yield the shell scripts of a workflow: 'run' of GitHub, 'script' and so on of GitLab."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("run", "script", "before_script"):
                yield from [value] if isinstance(value, str) else value
            else:
                yield from scripts_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from scripts_of(value)


RUNNERS = {
    "github.yml": ("jobs", "runner", "strategy", "matrix", "include"),
    "gitlab.yml": ("runner", "parallel", "matrix"),
}
"""The lists of the workflows' runners, by their keys; each entry names the packages of its QEMU."""


@pytest.mark.parametrize(("name", "keys"), RUNNERS.items())
def test_a_workflow_installs_the_qemu_of_each_runners_architecture(
    name: str, keys: tuple[str, ...]
) -> None:
    workflow = yaml.safe_load((ROOT / "docs" / "ci" / name).read_text())
    for key in keys:
        workflow = workflow[key]
    packages = {value for entry in workflow for value in entry.values()}
    for architecture in ("x86_64", "aarch64"):
        assert ARCHITECTURES[architecture].qemu_packages["debian"] in packages


@pytest.mark.parametrize("name", RUNNERS)
def test_a_workflow_installs_what_dmaproof_and_its_guests_are_built_with(name: str) -> None:
    text = (ROOT / "docs" / "ci" / name).read_text()
    needs = (distribution.COMPILER, distribution.STATIC_LIBC)
    packages = {word for need in needs for word in need.packages["debian"].split()}
    lists = re.findall(r"(?<= )gcc [a-z0-9 -]+(?=\n)", text)
    assert len(lists) == 2  # with the system's QEMU, and with fetched ones
    for found in lists:
        assert packages | {"python3-dev", "python3-venv"} == set(found.split())


def plugin_options() -> set[str]:
    """Return the options of the pytest plugin."""
    parser = mock.Mock(spec=pytest.Parser)
    pytest_addoption(parser)
    group = parser.getgroup.return_value
    return {name for call in group.addoption.call_args_list for name in call.args}


@pytest.mark.parametrize("file", CI, ids=lambda file: file.name)
def test_the_commands_and_options_of_workflows_exist(file: Path) -> None:
    scripts = list(scripts_of(yaml.safe_load(file.read_text())))
    commands = []
    for script in scripts:
        # The services replace their own expressions by values.
        shell = re.sub(r"\$\{\{.*?\}\}", "VALUE", script)
        subprocess.run(["bash", "-n", "-c", shell], check=True)
        commands += [words for line in shell.splitlines() for words in commands_in(line)]
    assert commands
    for words in commands:
        if words[0] != "test":  # ./dmaproof's own
            assert error_of(words) is None, words
    known = plugin_options()
    assert set(re.findall(r"--dmaproof-[a-z]+", "\n".join(scripts))) <= known


def test_the_pages_build_without_warnings(tmp_path: Path) -> None:
    """Warnings are errors, and every public name is in the reference."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "plugin").symlink_to(ROOT / "plugin")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", "html"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {file.stem for file in (tmp_path / "html").glob("*.html")}
    assert {file.stem for file in (ROOT / "docs").glob("*.md")} <= pages
    reference = (tmp_path / "html" / "reference.html").read_text()
    public = [f"dmaproof.{name}" for name in (*dmaproof.__all__, "IovaBitmap.set_many")]
    public += [f"qmp_tools.{name}" for name in (*qmp_tools.__all__, "Environment.check")]
    # The reference has names that both modules export only once.
    public += [f"qmp_tools.aio.{name}" for name in aio.__all__ if name not in qmp_tools.__all__]
    assert [name for name in public if f'id="{name}"' not in reference] == []
    assert "--requests-after" in (tmp_path / "html" / "command-line.html").read_text()
