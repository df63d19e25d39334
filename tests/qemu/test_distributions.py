"""README's command in models of other distributions: what it installs there, and its verdict."""

from __future__ import annotations

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
}
"""The command lines of the package manager: for Python, for 'doctor', and for 'prove'."""


def run(tree: Tree, *command: str, exit_code: int = 0) -> str:
    done = tree.run(*command, folder=CHECKOUT, timeout_s=TIMEOUT_S)
    assert done.returncode == exit_code, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", MODELS)
def test_commands_of_the_readme(name: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with distribution_tree(MODELS[name]) as tree:
        before = run(tree, "./dmaproof", "doctor", exit_code=3)
        assert "MISSING  QEMU" in before
        for package in INSTALLED[name][-1].split(" ")[-2:]:
            assert f" {package}\n" in before, before
        user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        refused = run(tree, *user, "./dmaproof", "prove", exit_code=3)
        assert f"packages are missing; run: sudo {INSTALLED[name][-1]}\n" in refused
        assert requests(tree) == INSTALLED[name][:-1]
        verdict = run(tree, "./dmaproof", "prove")
        assert "PASS: all pages are equal" in verdict
        assert "the host's /usr/lib/modules/" in verdict
        assert requests(tree) == INSTALLED[name]
        after = run(tree, "./dmaproof", "doctor")
        assert "a proof can run: dmaproof prove --guest linux" in after
