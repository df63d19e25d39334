"""The pytest plugin with real QEMUs, in a project outside the tree."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest_plugins = ["pytester"]
PROJECT = """
import os, pytest

DISK = ("-machine", "q35,memory-backend=ram", "-m", "64",
        "-object", "memory-backend-memfd,id=ram,size=64M,share=on")

@pytest.mark.tcg
def test_equal(migration_pair, ram_check):
    pair = migration_pair(*DISK)
    pair.migrate()
    assert ram_check(pair.source, pair.destination).pages > 16000

@pytest.mark.tcg
def test_differs(migration_pair, ram_check):
    pair = migration_pair(*DISK)
    pair.migrate()
    answer = pair.destination.execute("human-monitor-command", command_line="gpa2hva 0x2345000")
    with open(f"/proc/{pair.destination.pid}/mem", "r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), b"!", int(answer.split()[-1], 16))
    ram_check(str(pair.source.socket_path), pair.destination.socket_path)

@pytest.mark.tcg
def test_survives(vhost_user_blk):
    vhost_user_blk(tracker="dirty-ring").assert_dma_survived()

@pytest.mark.tcg
def test_is_lost(vhost_user_blk):
    vhost_user_blk(fault="drop-pages=0.01").assert_dma_survived()

@pytest.mark.qemu_version(">=999")
def test_too_new():
    pass

@pytest.mark.qemu_version(">=2,<999")
def test_raises(qemu):
    running = qemu("-machine", "none")
    with open("pids", "a") as pids:
        print(running.pid, file=pids)
    assert running.execute("query-status")["status"] == "no such status"
"""


def test_a_project(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.delenv("DMAPROOF_NO_SKIP", raising=False)
    # A short path, for sockets; files that are left in it were not cleaned up.
    scratch = tmp_path_factory.mktemp("s")
    monkeypatch.setenv("TMPDIR", str(scratch))
    pytester.makepyfile(PROJECT)
    options = ("-ra", "--strict-markers", "--junitxml=junit.xml", "--dmaproof-reports=reports")
    result = pytester.runpytest_subprocess(*options, "--dmaproof-seed=1", "--basetemp=base")
    result.assert_outcomes(passed=2, failed=3, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*RamDiffersError: 1 of 16* pages differ*",
            "*- dmaproof verdict -*",
            "*GPA 0x2345000 (ram +0x2345000): 1 byte differs*",
            "*AssertionError: * pages were lost*",
            "*- dmaproof verdict -*",
            "*lost by the device*",
            "*data of request * on queue *, to IOVA *, lost at the dirty log*",
            "*no such status*",
            "*SKIPPED*the test needs QEMU >=999, found *: run 'dmaproof qemu fetch VERSION'*",
        ]
    )
    assert not list(scratch.iterdir())
    (pid,) = (pytester.path / "pids").read_text().split()
    assert not Path(f"/proc/{pid}").exists()

    properties = {
        case.get("name"): {one.get("name"): one.get("value") for one in case.iter("property")}
        for case in ElementTree.parse(pytester.path / "junit.xml").iter("testcase")
    }
    for name in ("test_equal", "test_is_lost", "test_raises"):
        assert str(properties[name]["qemu_version"])[0].isdigit()
    assert str(properties["test_survives"]["dmaproof_verdict"]).startswith("all pages are equal")
    folder = pytester.path / "reports"
    reports = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    verdicts = {name.rpartition("--")[2]: report["exit_code"] for name, report in reports.items()}
    assert verdicts == {
        "test_equal-1": 0,
        "test_differs-1": 1,
        "test_survives-1": 0,
        "test_is_lost-1": 1,
    }
    assert len(list(folder.glob("*.html"))) == len(reports)
