"""The recipes of docs/third-party-devices.md, and the programs that they need."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from pathlib import Path
from typing import Final

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.guest.build import cache
from qmp_tools.host.archive import Archive, unpack
from qmp_tools.host.cached_folder import fresh_folder
from qmp_tools.qemu.builds import QemuBuild, fetch, installed, make_whole

from .command import Outcome, Tool

ROOT: Final = Path(__file__).parents[2]
RECIPES: Final = (ROOT / "docs" / "third-party-devices.md").read_text()
BRIEF: Final = ("--requests-after", "200", "--workload", "write_once=1400")


def recipe(program: str, word: str = "") -> list[str]:
    """Return the first recipe for `program` with `word` in the docs, with JSON output."""
    commands = re.findall(r"(?m)^    (dmaproof prove (?:.*\\\n)*.*)$", RECIPES)
    command = next(
        text for text in commands if f"--device-command '{program} " in text and word in text
    )
    return [*shlex.split(command.replace("\\\n", ""))[1:], "--quiet", "--json", "-"]


def prove(tool: Tool, *arguments: str) -> Outcome:
    return tool.run("prove", "--quiet", "--json", "-", *arguments)


def assert_passed(
    outcome: Outcome, device: str, *, certain: bool = True, least: int = 1000
) -> None:
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert report["setup"]["device"] == device
    assert report["setup"]["tracker"] is None
    assert report["lost_pages"] == []
    assert report["guest"]["errors"] == 0
    assert report["sensitivity"]["evidence_source"] == "guest"
    assert report["sensitivity"]["rewritten"] >= least
    assert (report["sensitivity"]["guaranteed_detectable"] > 0) == certain
    assert report["sensitivity"]["unreported"] is None


@functools.cache
def newer_qemu() -> QemuBuild:
    """A QEMU fetched from Debian 13 or later, with its virtiofsd."""
    build = next(
        (each for each in installed(X86_64) if each.path.with_name("virtiofsd").exists()), None
    )
    return build or fetch("trixie", X86_64)


@functools.cache
def newest_qemu() -> QemuBuild:
    """The newest QEMU that the recipes name, fetched."""
    return next(
        (each for each in installed(X86_64) if each.version.startswith("11.1.")), None
    ) or fetch("11.1", X86_64)


def on_newer_qemu(
    program: str, *command: str, word: str = "", qemu: QemuBuild | None = None
) -> list[str]:
    """Return the recipe of `program` with `word` for a fetched `qemu`; `command` is the program."""
    arguments = recipe(program, word)
    arguments[arguments.index("--qemu") + 1] = str((qemu or newer_qemu()).path)
    at = arguments.index("--device-command") + 1
    arguments[at] = " ".join([*command, arguments[at].removeprefix(program)])
    return arguments


def fetched(suite: str, package: str, programs: dict[str, str]) -> Path:
    """Return the folder of `programs` in `package` of a Debian suite, which is fetched once.

    Args:
        suite: the suite.
        package: the package's name.
        programs: the folder of each program in the package.
    """
    # Not below the temporary folder: DPDK loads nothing from a world-writable folder.
    target = cache() / f"{package}-{suite}"
    with fresh_folder(target) as fresh:
        if fresh is not None:
            archive = Archive(suite, fresh / "apt")
            for each in archive.fetch_closure([package]):
                unpack(each, fresh / "root")
            make_whole(fresh, programs)
            shutil.rmtree(fresh / "apt")
    return target


def dpdk(suite: str) -> list[str]:
    """Return the words that start testpmd of a Debian suite, with the options for its drivers."""
    target = fetched(suite, "dpdk-dev", {"dpdk-testpmd": "usr/bin"})
    folder = next((target / "root/usr/lib").glob("*/dpdk/pmds-*"))
    drivers = [f"-d {folder}/librte_{name}.so" for name in ("net_vhost", "mempool_ring")]
    return [str(target / "dpdk-testpmd"), *drivers]


def passt() -> str:
    """Return the path of Debian 13's passt, the first that is a vhost-user back end."""
    return str(fetched("trixie", "passt", {"passt": "usr/bin"}) / "passt")
