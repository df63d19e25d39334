"""Kernels of patches and of source trees in L1, and a bisection.

The first run builds the source without patches, which takes about 6 minutes on two idle cores. That
build stays in the cache of the test's user. The other builds begin with a copy of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qmp_tools.passthrough.l1.kernel import DEFAULT_KERNEL
from qmp_tools.passthrough.l1.packaged import plain_build
from qmp_tools.passthrough.l1.root import l1_root
from qmp_tools.passthrough.l1.tree import folder_of_tree
from support.command import TIMEOUT_S, Tool

pytestmark = pytest.mark.timeout(7200)

FILE = "drivers/iommu/iommufd/iova_bitmap.c"
GOOD = "bitmap_set(kaddr, offset, nbits);"
BAD = "bitmap_set(kaddr, offset, nbits - (nbits > 1));"
"""Loses the last page of each range of several pages."""
PROOFS = ("--only", "differential", "--quick")


@pytest.fixture(scope="module")
def source() -> Path:
    """Return the distribution's source without patches."""
    return plain_build(l1_root(), DEFAULT_KERNEL) / "source"


def git(tree: Path, *words: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    done = subprocess.run(
        ["git", *identity, *words],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_patch_that_loses_pages_fails_the_proofs(
    tool: Tool, source: Path, tmp_path: Path
) -> None:
    text = (source / FILE).read_text()
    assert text.count(GOOD) == 1
    for side, content in (("a", text), ("b", text.replace(GOOD, BAD))):
        (tmp_path / side / FILE).parent.mkdir(parents=True)
        (tmp_path / side / FILE).write_text(content)
    done = subprocess.run(
        ["git", "diff", "--no-index", "--no-prefix", "a", "b"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    patch = tmp_path / "lossy.patch"
    patch.write_bytes(done.stdout)
    outcome = tool.run("passthrough", "--kernel-patch", str(patch), *PROOFS, "--json", "-")
    assert outcome.exit_code == 1, outcome.errors[-4000:]
    assert "lossy.patch" in outcome.report["kernel_source"]
    states = {row["name"]: row["state"] for row in outcome.report["outcomes"]}
    assert states["the kernel's iterator and IovaBitmap"] == "fails"
    assert (source / FILE).read_text() == text


def test_a_patch_that_does_not_apply_is_named(tool: Tool, source: Path, tmp_path: Path) -> None:
    patch = tmp_path / "my patch"
    patch.write_text(f"--- a/{FILE}\n+++ b/{FILE}\n@@ -1 +1 @@\n-no such line\n+another\n")
    outcome = tool.run("passthrough", "--kernel-patch", str(patch))
    assert outcome.exit_code == 3
    assert f"patch -p1 does not apply {patch}" in outcome.errors
    assert "Hunk #1 FAILED" in outcome.errors


def test_a_bisection_finds_the_commit_that_loses_pages(source: Path, tmp_path: Path) -> None:
    tree = tmp_path.resolve() / "my linux"
    shutil.copytree(source, tree, symlinks=True, copy_function=os.link)
    build = folder_of_tree(l1_root(), tree)
    # A build of the same source, so that only the changes are compiled.
    shutil.copytree(source.parent / "build", build / "build", symlinks=True)
    content = (tree / FILE).read_text()
    git(tree, "init", "-q")
    commits = []
    for number in range(5):
        if number == 2:
            content = content.replace(GOOD, BAD)
        (tree / FILE).unlink()  # a hard link
        (tree / FILE).write_text(f"{content}/* {number} */\n")
        git(tree, "add", "-f", FILE)
        git(tree, "commit", "-qm", f"change {number}")
        commits.append(git(tree, "rev-parse", "HEAD").strip())
    git(tree, "bisect", "start", commits[-1], commits[0])
    command = (sys.executable, "-m", "qmp_tools.cli", "passthrough", "--kernel-source", ".")
    found = git(tree, "bisect", "run", *command, *PROOFS, "--bisect")
    assert f"{commits[2]} is the first bad commit" in found
