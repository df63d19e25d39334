"""Passthrough reports as KTAP, which the kernel's CIs read."""

from __future__ import annotations

from typing import Any

from qmp_tools.reports.ktap import to_ktap


def row(group: str, name: str, state: str, found: str = "found") -> dict[str, Any]:
    return {"group": group, "name": name, "state": state, "found": found}


def run(*rows: dict[str, Any], **more: str) -> dict[str, Any]:
    return {"kind": "passthrough", "outcomes": list(rows), **more}


def test_groups_are_tests_and_proofs_their_subtests() -> None:
    report = run(
        row("rules", "TYPE1: overwrites", "holds"),
        row("rules", "HWPT: only sets bits", "fails", "3 bits\ncleared"),
        row("states", "transfer", "holds"),
    )
    assert to_ktap(report) == (
        "KTAP version 1\n"
        "1..2\n"
        "  KTAP version 1\n"
        "  # Subtest: rules\n"
        "  1..2\n"
        "  ok 1 TYPE1: overwrites\n"
        "  # 3 bits\n"
        "  # cleared\n"
        "  not ok 2 HWPT: only sets bits\n"
        "not ok 1 rules\n"
        "  KTAP version 1\n"
        "  # Subtest: states\n"
        "  1..1\n"
        "  ok 1 transfer\n"
        "ok 2 states\n"
    )


def test_unsupported_proofs_are_skipped_and_so_is_a_group_of_them() -> None:
    lines = to_ktap(
        run(
            row("rules", "first", "lacking", "no\n/dev/iommu"),
            row("states", "second", "lacking"),
            row("states", "third", "holds"),
        )
    ).splitlines()
    assert "  ok 1 first # SKIP no /dev/iommu" in lines
    assert "ok 1 rules # SKIP no proof of rules is supported" in lines
    assert "ok 2 states" in lines


def test_what_was_not_tested_is_not_ok() -> None:
    lines = to_ktap(run(row("rules", "first", "untested", "timeout"))).splitlines()
    assert lines[-3:] == ["  # timeout", "  not ok 1 first", "not ok 1 rules"]
    untested = {"kind": "passthrough-untested", "verdict": "could not be tested: no kernel"}
    assert to_ktap(untested).splitlines()[2:] == [
        "# could not be tested: no kernel",
        "not ok 1 passthrough",
    ]


def test_each_pair_of_a_table_is_a_test_above_its_groups() -> None:
    pairs = [
        run(row("rules", "first #1", state), kernel="7.3.4", qemu=qemu)
        for qemu, state in (("10.0.13", "holds"), ("11.1.3", "fails"))
    ]
    lines = to_ktap({"kind": "passthrough-matrix", "runs": pairs}).splitlines()
    assert lines[1] == "1..2"
    assert "    ok 1 first 1" in lines  # '#' would begin a directive
    assert "ok 1 kernel 7.3.4, QEMU 10.0.13" in lines
    assert lines[-1] == "not ok 2 kernel 7.3.4, QEMU 11.1.3"
