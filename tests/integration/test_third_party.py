"""Parts of other distributions: found, used, and refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outside import environment, install, install_outside_package

SIMULATE = """
import json, sys
from pathlib import Path
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.testbed.simulation import simulate
options = json.loads(sys.argv[1])
verdict = simulate(DeviceOptions(seed=3, harvest="final", **options), Path(sys.argv[2]))
print(json.dumps([verdict.exit_code, sorted({page.link for page in verdict.lost})]))
"""
SERVE = """
import subprocess, socket, sys
parent, control = socket.socketpair()
peer, device_peer = socket.socketpair()
with control, device_peer:
    process = subprocess.Popen(
        [sys.executable, "-m", "dmaproof.vhost_user", "--control", str(control.fileno()),
         "--fd", f"a={device_peer.fileno()}", *sys.argv[1:]],
        pass_fds=(control.fileno(), device_peer.fileno()), stderr=subprocess.PIPE)
events = parent.recv(1 << 16)
parent.close()
_, errors = process.communicate(timeout=60)
print(process.returncode, events.decode(), errors.decode())
"""


def python(target: Path, program: str, *arguments: str) -> str:
    """Return the output of a Python program that finds the distributions in `target`."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(target),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(target: Path, expression: str) -> str:
    """Return an expression's value, or the message of the error that it raises."""
    return python(
        target,
        "from dmaproof import *\n"
        f"try: print({expression})\nexcept UsageError as error: print(error)",
    ).strip()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Return a folder with the outside package installed."""
    install_outside_package(tmp_path / "outside")
    return tmp_path / "outside"


def test_parts_of_another_distribution_are_found(outside: Path) -> None:
    listed = "sorted(emulated_trackers()), sorted(emulated_devices()), sorted(known_faults())"
    names: tuple[list[str], ...] = tuple(json.loads(ask(outside, f"[{listed}]").replace("'", '"')))
    for built_in, third_party, found in zip(
        ("iommu", "blk", "drop-pages"),
        ("page-list", "stamped-disk", "deaf-pages"),
        names,
        strict=True,
    ):
        assert {built_in, third_party} <= set(found)
    assert ask(outside, "make_device('stamped-disk').name") == "stamped-disk"
    assert ask(outside, "make_fault('deaf-pages=0.5', seed=1).value") == "0.5"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tracker": "page-list"}, [0, []]),
        ({"tracker": "page-list", "device": "stamped-disk"}, [0, []]),
        ({"tracker": "page-list", "fault": "deaf-pages"}, [1, ["tracker"]]),
    ],
)
def test_parts_of_another_distribution_pass_or_are_caught_on_the_test_bed(
    outside: Path, tmp_path: Path, options: dict[str, str], expected: list[Any]
) -> None:
    assert json.loads(python(outside, SIMULATE, json.dumps(options), str(tmp_path))) == expected


def test_the_device_process_finds_third_party_parts(outside: Path) -> None:
    chosen = ["--tracker=page-list", "--device=stamped-disk", "--fault=deaf-pages"]
    assert '"event": "connected"' in python(outside, SERVE, *chosen)


def test_a_third_party_scenario_and_kind_of_device_are_found(outside: Path) -> None:
    output = python(
        outside,
        "from qmp_tools import known_scenarios\n"
        "from qmp_tools.devices.registry import device_kinds, kind_of\n"
        "print({'unix', 'four-channels'} <= set(known_scenarios()))\n"
        "print(known_scenarios()['four-channels'].parameters)\n"
        "names = {name for kind in device_kinds().values() for name in kind().names()}\n"
        "print({'plain-disk', 'blk'} <= names)\n"
        "print(*(type(kind_of([name], None)).__name__ for name in ('plain-disk', 'blk')))",
    )
    expected = ("True", "{'multifd-channels': 4}", "True", "PlainDiskKind EmulatedKind")
    assert output.splitlines() == [*expected]


def test_an_option_that_the_kind_does_not_have_is_refused(outside: Path) -> None:
    message = python(
        outside,
        "import qmp_tools, dmaproof\n"
        "try: qmp_tools.prove(device='plain-disk', tracker='iommu', guest='bare')\n"
        "except dmaproof.UsageError as error: print(error)",
    )
    assert message == "--tracker does not apply to --device plain-disk\n"


def broken(target: Path, name: str, group: str, part: str, text: str) -> Path:
    """Return a folder with a distribution `name` whose module contains `text`."""
    install(target, name, {group: {part: "their_module:Part"}})
    (target / "their_module.py").write_text(text)
    return target


TRACKER = """
from dmaproof import EmulatedTracker
class Part(EmulatedTracker):
    name = "vendor"
    def start(self, ranges, page_size): return page_size
    def stop(self): pass
    def dma(self, iova, length): pass
    def read_and_clear(self, bitmap, iova, length): pass
"""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("import sys; sys.exit(3)", "cannot be loaded: SystemExit(3)"),
        ("", "cannot be loaded: AttributeError"),
        ("class Part: name = 'vendor'", "is not a subclass of dmaproof.EmulatedTracker"),
        ("Part = 7", "is not a subclass of dmaproof.EmulatedTracker"),
        (TRACKER.replace("dma(", "DMA("), "does not define dma;"),
        (TRACKER.replace("    name =", "    title ="), "does not define name;"),
        (TRACKER.replace('"vendor"', '"mine"'), "the attribute 'name' 'mine'"),
    ],
)
def test_a_broken_part_is_refused_only_where_it_is_used(
    tmp_path: Path, text: str, why: str
) -> None:
    folder = broken(tmp_path, "their-tool", "dmaproof.trackers", "vendor", text)
    message = ask(folder, "emulated_trackers()['vendor']")
    assert message.startswith("tracker 'vendor' of distribution 'their-tool' (their_module:Part)")
    assert why in message
    assert "fix or uninstall that distribution" in message
    assert ask(folder, "'vendor' in emulated_trackers()") == "True", "its name is listed"
    assert ask(folder, "emulated_trackers()['iommu'].name") == "iommu"
    assert ask(folder, "sorted(set(emulated_trackers()) - set(emulated_trackers().usable()))") == (
        "['vendor']"
    )
    assert '"event": "connected"' in python(folder, SERVE, "--tracker", "iommu")
    refused = python(folder, SERVE, "--tracker", "vendor")
    assert refused.startswith("2 ")
    assert refused.count("of distribution 'their-tool'") == 2, "as event and in the log"


def test_a_valid_part_is_accepted(tmp_path: Path) -> None:
    folder = broken(tmp_path, "their-tool", "dmaproof.trackers", "vendor", TRACKER)
    assert ask(folder, "emulated_trackers()['vendor'].__module__") == "their_module"


def test_a_fault_must_name_its_link(tmp_path: Path) -> None:
    text = "from dmaproof import Fault\nclass Part(Fault): name = 'vendor'"
    folder = broken(tmp_path, "their-tool", "dmaproof.faults", "vendor", text)
    assert "does not define link;" in ask(folder, "known_faults()['vendor']")


def test_a_name_of_two_parts_is_refused_as_ambiguous(tmp_path: Path) -> None:
    for distribution in ("one", "two"):
        broken(tmp_path, distribution, "dmaproof.trackers", "vendor", TRACKER)
    message = ask(tmp_path, "emulated_trackers()['vendor']")
    assert "'vendor' is ambiguous: distribution 'one' (their_module:Part) and" in message
    assert "distribution 'two'" in message
    assert "uninstall one of them, or rename" in message


def test_dmaproofs_own_names_cannot_be_replaced(tmp_path: Path) -> None:
    folder = broken(tmp_path, "their-tool", "dmaproof.devices", "blk", "")
    message = ask(folder, "make_device('blk')")
    assert "device 'blk' is ambiguous: dmaproof itself and distribution 'their-tool'" in message
    assert ask(folder, "make_device('rng').name") == "rng"
