"""README's command in models of other distributions: what it installs there, and its verdict."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

import pytest

from support.debian_tree import Tree, why_not
from support.distribution_tree import CHECKOUT, MODELS, distribution_tree, requests

pytestmark = pytest.mark.timeout(3600)

TIMEOUT_S: Final = 1500.0

INSTALLED: Final = {
    "fedora": [
        "dnf install -y python3",
        "dnf install -y python3.13-devel gcc",
        "dnf install -y qemu-system-x86-core glibc-static",
    ],
    "arch": [
        "pacman -Syu --noconfirm --needed python",
        "pacman -Syu --noconfirm --needed gcc",
        "pacman -Syu --noconfirm --needed qemu-system-x86 linux",
    ],
    "opensuse": [
        "zypper install -y --no-recommends python3",
        "zypper install -y --no-recommends python313-devel gcc glibc-devel",
        "zypper install -y --no-recommends qemu-x86 glibc-devel-static",
    ],
    "ubuntu": [
        "apt-get install -y --no-install-recommends python3 python3-venv",
        "apt-get install -y --no-install-recommends python3.13-dev gcc libc6-dev",
        "apt-get install -y --no-install-recommends qemu-system-x86",
    ],
}
"""The command lines of the package manager: for Python, for 'doctor', and for 'prove'."""


def run(tree: Tree, *command: str, exit_code: int = 0) -> str:
    done = tree.run(*command, folder=CHECKOUT, timeout_s=TIMEOUT_S)
    assert done.returncode == exit_code, done.stdout
    return done.stdout


@pytest.fixture(autouse=True)
def _trees_can_be_made() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.mark.parametrize("name", INSTALLED)
def test_commands_of_the_readme(name: str) -> None:
    with distribution_tree(MODELS[name]) as tree:
        before = run(tree, "./dmaproof", "doctor", exit_code=3)
        assert "MISSING  QEMU" in before
        *of_the_build, of_the_proof = INSTALLED[name]
        for package in set(of_the_proof.split()) - set(of_the_build[0].split()):
            assert re.search(rf"→ .* {package}( |$)", before, re.MULTILINE), before
        user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        refused = run(tree, *user, "./dmaproof", "prove", exit_code=3)
        assert refused.startswith("dmaproof: packages are missing; run: sudo ")
        assert refused.endswith(f"sudo {of_the_proof}\n")
        assert requests(tree) == of_the_build
        verdict = run(tree, "./dmaproof", "prove")
        assert "PASS: all pages are equal" in verdict
        assert f"the host's {'/boot' if MODELS[name].in_boot else '/lib/modules'}/" in verdict
        assert requests(tree) == INSTALLED[name]
        after = run(tree, "./dmaproof", "doctor")
        assert "a proof can run: dmaproof prove --guest linux" in after


def test_an_unknown_distribution_gets_the_names_of_the_needs() -> None:
    """Its shell and its other programs are busybox's."""
    with distribution_tree(MODELS["alpine"]) as tree:
        run(tree, "busybox", "sh", "-c", "mkdir /applets && busybox --install -s /applets")
        applets = replace(tree, variables={**tree.variables, "PATH": "/applets:/usr/sbin:/usr/bin"})
        assert "MISSING  QEMU" in run(applets, "./dmaproof", "doctor", exit_code=3)
        need = "QEMU (qemu-system-x86_64)"
        message = f"dmaproof: install with the package manager of Alpine Linux v3.22: {need}\n"
        assert run(applets, "./dmaproof", "prove", exit_code=3) == message
        assert requests(tree) == []
