"""A matrix without QEMU: its axes, cells, resources, result cache and reports."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dmaproof
from dmaproof.devices import emulated_devices
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.errors import UntestableError, UsageError
from qmp_tools.arch import ARCHITECTURES
from qmp_tools.integrations.avocado_plugins import options_of
from qmp_tools.matrix import axes
from qmp_tools.matrix.avocado_recipe import runnables
from qmp_tools.matrix.axes import Matrix, is_matrix, make_matrix, read_matrix, split_values
from qmp_tools.matrix.proof_cells import memory_of
from qmp_tools.matrix.resources import Resources
from qmp_tools.matrix.result import Result, State, result_of, skipped, untested
from qmp_tools.matrix.result_cache import ResultCache, build_of_dmaproof
from qmp_tools.migration.scenarios import known_scenarios
from qmp_tools.proof.model import Setup
from qmp_tools.proof.options import OPTIONS, ProofOptions
from qmp_tools.qemu.builds import QemuBuild
from qmp_tools.qemu.machine import GIB
from qmp_tools.reports.matrix_report import grid_of, to_json, to_text
from support.setups import key, setup, setup_of_files

MATRIX = Matrix({"qemu": ["7.2", "11.1"], "scenario": ["unix", "tls"], "guest": ["bare"]})
LOST = Result(State.LOST, "3 of 9 pages were lost", ["device"], ["GPA 0x1000: …"], seed=7)
CLEAN = Result(
    State.CLEAN, "all pages are equal", guaranteed_detectable=8192, command=["dmaproof", "prove"]
)


# Axes and cells


@pytest.fixture(autouse=True)
def known_qemus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one QEMU known; a search for those of this machine would start them."""
    build = QemuBuild("7.2.22", "bookworm", Path("/bin/sh"))
    monkeypatch.setattr(axes, "known_qemus", lambda architecture: [build])


def test_the_last_axis_changes_the_fastest() -> None:
    names = [MATRIX.label(cell) for cell in MATRIX.cells()]
    assert names == [
        f"qemu={qemu} scenario={scenario}"
        for qemu in ("7.2", "11.1")
        for scenario in ("unix", "tls")
    ]
    assert all(cell["guest"] == "bare" for cell in MATRIX.cells())


def test_every_option_of_a_proof_can_be_an_axis() -> None:
    for option in OPTIONS.values():
        texts = {
            "memory": "1G",
            "memory-backend": "file:/tmp",
            "destination-lacks": "flush",
            "capability": "xbzrle",
            "parameter": "multifd-channels=8",
        }
        value = next(iter(option.values), texts.get(option.key, "1"))
        matrix = make_matrix({option.key: [value]})
        assert matrix.cells() == [{option.key: value}]


def test_an_axis_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[matrix]\nkill_device = [true]\nkill-device = [false]\n")
    with pytest.raises(UsageError, match="kill-device is given twice"):
        read_matrix(file)


def test_all_and_patterns_expand_to_the_known_values() -> None:
    assert make_matrix({"tracker": ["all"]}).axes["tracker"] == sorted(emulated_trackers())
    assert set(make_matrix({"device": ["all"]}).axes["device"]) >= emulated_devices().keys()
    kinds = make_matrix({"memory-backend": ["memfd", "hugetlb-*"]}).axes["memory-backend"]
    assert kinds == ["memfd", "hugetlb-2M", "hugetlb-1G"]
    names = make_matrix({"scenario": ["multifd-*", "unix", "multifd-4"]}).axes["scenario"]
    multifd = [name for name in known_scenarios() if name.startswith("multifd-")]
    assert names == [*multifd, "unix"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("unix,tls", ["unix", "tls"]),
        ("q35,hpet=off,pc", ["q35,hpet=off", "pc"]),
        ("pattern=hot-set,threads=4", ["pattern=hot-set,threads=4"]),
        ("drop-pages=0.01", ["drop-pages=0.01"]),
        ("blk,net:mtu=9000,queues=2", ["blk", "net:mtu=9000,queues=2"]),
    ],
)
def test_a_comma_before_a_name_belongs_to_the_value(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_a_switch_is_on_or_off_and_spaces_separate_the_values_of_a_repeatable_option(
    tmp_path: Path,
) -> None:
    file = write(tmp_path, '[matrix]\nkill-device = [false, true]\ndevice = "blk rng"\n')
    cells = read_matrix(file).cells()
    assert [ProofOptions.of(cell).words() for cell in cells] == [
        ["--device=blk", "--device=rng"],
        ["--device=blk", "--device=rng", "--kill-device"],
    ]
    assert make_matrix({"kill-device": ["all"]}).axes["kill-device"] == ["off", "on"]
    assert make_matrix({"iommu": ["intel*"]}).axes["iommu"] == ["intel", "intel-lazy"]
    assert make_matrix({"arch": ["all"]}).axes["arch"] == list(ARCHITECTURES)
    with pytest.raises(UsageError, match="--kill-device: expected on or off, got 'maybe'"):
        make_matrix({"kill-device": ["maybe"]})


def test_an_empty_value_omits_the_option() -> None:
    matrix = make_matrix({"fault": ["", "drop-pages=0.01"], "guest": ["bare"]})
    assert matrix.cells() == [{"guest": "bare"}, {"fault": "drop-pages=0.01", "guest": "bare"}]
    assert matrix.label(matrix.cells()[0]) == "fault=none"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"wya": ["unix"]}, "wya is not an option of a proof"),
        ({"scenario": ["unix", "pigeon"]}, "pigeon"),
        ({"scenario": ["pigeon-*"]}, "matches none of .*unix"),
        ({"memory": ["all"]}, "has no list of values; give each value"),
        ({"cpus": ["0"]}, "cpus"),
        ({"scenario": []}, "expected at least one value"),
    ],
)
def test_wrong_axes_are_refused_before_anything_runs(
    axes: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_matrix(axes)


def write(folder: Path, text: str) -> Path:
    file = folder / "matrix.toml"
    file.write_text(text)
    return file


def test_options_replace_the_axes_of_a_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '[matrix]\nqemu_destination = ["7.2", "8"]\nscenario = ["unix", "multifd-4", "multifd-8"]\n'
        'queues = 2\n[[exclude]]\nqemu_destination = 8\nscenario = "multifd-*"\n',
    )
    assert is_matrix(file)
    matrix = read_matrix(file)
    assert matrix.axes["queues"] == ["2"]
    found = {(cell["qemu-destination"], cell["scenario"]) for cell in matrix.cells()}
    assert found == {("7.2", name) for name in matrix.axes["scenario"]} | {("8", "unix")}
    assert len(read_matrix(file, {"scenario": ["tls"], "guest": ["bare"]}).cells()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[matrix", "is not TOML"),
        ('scenario = "unix"\n', r"expected a table \[matrix\]"),
        ('[matrix]\nscenario = "unix"\n[except]\n', "unknown: except; expected only"),
        ("[matrix]\nscenario = {}\n", "expected a string, a number, or a list"),
        ('[matrix]\nscenario = "unix"\n[exclude]\nscenario = "tls"\n', "double brackets"),
        ('[matrix]\nscenario = "unix"\n[[exclude]]\nguest = "bare"\n', "guest is not an axis"),
        ('[matrix]\nscenario = "unix"\n[[exclude]]\nscenario = "*"\n', "rules exclude all of them"),
    ],
)
def test_an_error_in_a_matrix_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UsageError, match=message) as error:
        read_matrix(file)
    assert str(file) in str(error.value)


# Resources


PROCESSORS = setup().machine.cpus + 1


async def most_at_a_time(resources: Resources, proofs: int) -> int:
    running = most = 0

    async def run_proof() -> None:
        nonlocal running, most
        async with resources.reserve(PROCESSORS, memory_of(setup())):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1

    await asyncio.gather(*(run_proof() for _ in range(proofs)))
    return most


@pytest.mark.parametrize(
    ("processors", "memory_bytes", "jobs", "most"),
    [
        (9, 100 * GIB, None, 3),  # three processors each
        (2, 100 * GIB, None, 1),  # too few for one proof, which runs alone
        (9, 5 * GIB, None, 2),  # 2 GiB each, and what QEMU needs
        (1, 100 * GIB, 4, 4),
        (9, 5 * GIB, 4, 2),
    ],
)
def test_proofs_run_side_by_side_as_resources_allow(
    processors: int, memory_bytes: int, jobs: int | None, most: int
) -> None:
    async def measure() -> int:
        resources = Resources(processors, memory_bytes, jobs=jobs)
        return await most_at_a_time(resources, 5)

    assert asyncio.run(measure()) == most


def test_a_proof_larger_than_memory_does_not_start() -> None:
    async def begin() -> None:
        async with Resources(8, GIB).reserve(PROCESSORS, memory_of(setup())):
            pytest.fail("the proof has started")

    with pytest.raises(
        UntestableError, match="needs 2448 MiB of memory, but only 1024 MiB are free"
    ):
        asyncio.run(begin())


# The result cache

CELL = {"scenario": "unix", "guest": "bare"}
REPORT: dict[str, Any] = {"verdict": "could not be tested: x", "exit_code": 3, "reason": "x"}


@pytest.fixture
def current(tmp_path: Path) -> Setup:
    return setup_of_files(tmp_path)


def test_a_result_is_reused_until_its_cell_or_key_changes(
    current: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = key(CELL, current)
    with ResultCache.open(tmp_path / "cache") as cache:
        assert cache.find(CELL, first) is None
        cache.store(CELL, first, REPORT, 2.5)
    with ResultCache.open(tmp_path / "cache") as cache:
        found = cache.find(CELL, first)
        assert found is not None
        assert (found["report"], found["seconds"]) == (REPORT, 2.5)
        assert cache.find({**CELL, "scenario": "tls"}, first) is None
        assert cache.find(CELL, "another key") is None
        cache.file(CELL).write_text("{")
        assert cache.find(CELL, first) is None
    assert key(CELL, replace(current, options=ProofOptions(seed=2))) == first, (
        "the cell gives no seed"
    )
    machines = [replace(current.machine, memory_bytes=2 * GIB), replace(current.machine, cpus=3)]
    others = [replace(current, machine=machine) for machine in machines]
    others.append(replace(current, qemu_destination=tmp_path / "kernel"))
    assert first not in {key(CELL, other) for other in others}
    assert key({**CELL, "seed": "2"}, current) != first
    monkeypatch.setattr(
        "qmp_tools.matrix.result_cache.build_of_dmaproof", lambda: "another dmaproof"
    )
    assert key(CELL, current) != first


@pytest.mark.parametrize("name", ["qemu", "kernel", "initramfs"])
def test_a_file_counts_by_its_content(current: Setup, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    first, times = key(CELL, current), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_text("two")
    os.utime(file, ns=times)
    assert key(CELL, current) != first
    file.write_text("one")
    os.utime(file, ns=(1, 1))
    assert key(CELL, current) == first


def test_a_write_that_fails_leaves_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def half(self: Path, text: str) -> int:
        write_text(self, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResultCache.open(tmp_path / "cache") as cache:
        cache.store(CELL, "old", REPORT, 1.0)
        monkeypatch.setattr(Path, "write_text", half)
        with pytest.raises(UsageError, match="No space left"):
            cache.store(CELL, "new", REPORT, 2.0)
        found = cache.find(CELL, "old")
    assert found is not None
    assert found["seconds"] == 1.0


def test_a_file_that_is_not_a_result_is_ignored(tmp_path: Path) -> None:
    with ResultCache.open(tmp_path / "cache") as cache:
        cache.file(CELL).write_text('["key"]')
        assert cache.find(CELL, "key") is None


def test_the_digest_of_dmaproof_leaves_out_pythons_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, cache = tmp_path / "part.py", tmp_path / "__pycache__"
    code.write_text("one")
    monkeypatch.setattr(dmaproof, "__path__", [str(tmp_path)])
    first = build_of_dmaproof.__wrapped__()
    cache.mkdir()
    (cache / "part.cpython-313.pyc.495").touch()  # Python renames such a file when it is complete
    assert build_of_dmaproof.__wrapped__() == first
    code.write_text("two")
    assert build_of_dmaproof.__wrapped__() != first


def test_another_host_python_or_machine_is_another_key(
    current: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, host = key(CELL, current), os.uname()
    for machine in (
        replace(current.machine, machine="another"),
        replace(current.machine, accelerator="another"),
    ):
        assert key(CELL, replace(current, machine=machine)) != first
    for place in (2, 3):  # release, version
        other = os.uname_result([*host[:place], "another", *host[place + 1 :]])
        with monkeypatch.context() as patch:
            patch.setattr(os, "uname", lambda other=other: other)
            assert key(CELL, current) != first
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "another")
        assert key(CELL, current) != first
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "another")
        assert key(CELL, current) != first
    assert key(CELL, current) == first


def test_only_one_matrix_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with (
        ResultCache.open(cache),
        pytest.raises(UsageError, match="another matrix is using"),
    ):
        ResultCache.open(cache).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"--folder {tmp_path / 'file'}"):
        ResultCache.open(tmp_path / "file").__enter__()


# Results and reports


def proof_report(exit_code: int, lost: dict[str, int], **more: int) -> dict[str, Any]:
    return {
        "verdict": "…",
        "exit_code": exit_code,
        "lost": lost,
        "lost_pages": [{"story": f"page {number}"} for number in range(sum(lost.values()))],
        "sensitivity": {"guaranteed_detectable": 5, "unreported": more.get("unreported", 0)},
        "guest": {"errors": more.get("errors", 0)},
        "log": None,
        "wrong_rings": [],
        "setup": {"qemu_version": "7.2", "qemu_destination_version": "8", "seed": 3},
    }


def test_a_result_names_the_cause_of_a_loss() -> None:
    lost = result_of(proof_report(1, {"device": 2, "qemu": 0, "accelerator": 30}), 1.0)
    assert lost.short == "LOST: device, accelerator"
    assert len(lost.stories) == 20
    assert result_of(proof_report(1, {"device": 0}, unreported=1), 1.0).blame == ["unreported"]
    wrong = {**proof_report(1, {"device": 0}), "wrong_rings": [{"queue": 0}]}
    assert result_of(wrong, 1.0).blame == ["ring"]
    assert result_of(proof_report(1, {"device": 0}, errors=1), 1.0).blame == ["guest"]
    assert result_of(proof_report(0, {"device": 0}), 1.0).state == State.CLEAN
    slow = result_of(proof_report(1, {"device": 0}), 1.0)
    assert (slow.state, slow.blame, slow.short) == (State.SLOW, [], "slow")
    assert to_json(Matrix({"scenario": ["unix"]}), [slow])["exit_code"] == 1
    assert result_of(REPORT, 1.0) == untested("x")
    assert result_of({**REPORT, "unsupported": True}, 1.0) == skipped("x")
    insensitive = {**proof_report(3, {"device": 0}), "verdict": "nothing was tested: …"}
    assert result_of(insensitive, 1.0) == untested("nothing was tested: …")


@pytest.mark.parametrize(
    ("results", "exit_code", "verdict"),
    [
        ([CLEAN] * 4, 0, "4 cells: 4 clean"),
        ([CLEAN, CLEAN, CLEAN, skipped("x")], 0, "4 cells: 3 clean, 1 skipped"),
        ([CLEAN, LOST, untested("x"), CLEAN], 1, "4 cells: 2 clean, 1 lost, 1 untested"),
        ([CLEAN, CLEAN, CLEAN, untested("x")], 3, "4 cells: 3 clean, 1 untested"),
        ([skipped("x")] * 4, 3, "4 cells: 4 skipped"),
    ],
)
def test_the_most_serious_cell_decides_the_exit_code(
    results: list[Result], exit_code: int, verdict: str
) -> None:
    answer = to_json(MATRIX, results)
    assert (answer["exit_code"], answer["verdict"]) == (exit_code, verdict)


def test_the_table_has_qemus_as_columns_and_notes_below() -> None:
    lacks = skipped("source QEMU refused it:\nno TLS")
    text = to_text(to_json(MATRIX, [CLEAN, lacks, LOST, lacks])).splitlines()
    assert text[2:5] == [
        "scenario  7.2 → 7.2    11.1 → 11.1",
        "unix      clean        LOST: device [2]",
        "tls       skipped [1]  skipped [1]",
    ]
    assert text[6:9] == ["[1] source QEMU refused it:", "    no TLS", "[2] 3 of 9 pages were lost"]
    assert text[-1] == "  GPA 0x1000: …"


def test_without_several_qemus_the_columns_are_the_last_axis() -> None:
    matrix = Matrix(
        {"scenario": ["unix", "tls"], "tracker": ["a", "b"]},
        [{"scenario": ["tls"], "tracker": ["b"]}],
    )
    grid = grid_of(to_json(matrix, [CLEAN] * 3))
    assert (grid.row_axes, grid.columns, grid.rows) == (
        ["scenario"],
        ["a", "b"],
        [("unix",), ("tls",)],
    )
    assert [[cell is not None for cell in row] for row in grid.cells] == [
        [True, True],
        [True, False],
    ]
    alone = grid_of(to_json(Matrix({}), [CLEAN]))
    assert (alone.columns, len(alone.rows)) == (["result"], 1)


# For avocado


def test_runnables_carry_their_options() -> None:
    found = runnables(MATRIX)
    assert found[1] == {
        "kind": "dmaproof",
        "uri": "qemu=7.2 scenario=tls",
        "kwargs": {"qemu": "7.2", "scenario": "tls", "guest": "bare"},
    }


def test_parameters_of_avocado_override_the_options_of_a_runnable() -> None:
    from avocado.core.nrunner.runnable import Runnable

    runnable = Runnable("dmaproof", "x", scenario="tls", guest="bare")
    assert options_of(runnable) == {"scenario": "tls", "guest": "bare"}
    nodes = [
        ["/run/a", [["/run/a", "scenario", "tcp"]]],
        ["/run/b", [["/run/b", "requests_after", 5]]],
    ]
    runnable.variant = {"variant": nodes, "variant_id": "1", "paths": ["/run/*"]}
    assert options_of(runnable) == {"scenario": "tcp", "guest": "bare", "requests-after": "5"}
