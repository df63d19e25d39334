"""The findings in Linux and QEMU: what their reproducers say, and the form of their patches."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jsonschema
import pytest

from dmaproof.errors import UnsupportedError, UntestableError, UsageError
from qmp_tools.cli import reproduce
from qmp_tools.cli.main import main
from qmp_tools.findings import FINDINGS, linux
from qmp_tools.findings.finding import (
    Attempt,
    Finding,
    Program,
    Reproduction,
    State,
    UnderTest,
    attempts,
)
from qmp_tools.findings.linux import LINUX_FINDINGS, LinuxFinding, judged
from qmp_tools.passthrough import catalog
from qmp_tools.passthrough.catalog import Request
from qmp_tools.passthrough.outcome import ProofFailedError, require_defect, run
from qmp_tools.passthrough.outcome import State as ProofState

ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "docs" / "upstream"
PATCHES = sorted(UPSTREAM.rglob("*.patch"))
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())


@dataclass(frozen=True)
class FakeFinding(Finding):
    """A finding with a known outcome, or without one if `outcome` is an error."""

    program: ClassVar[Program] = Program.LINUX
    outcome: State | UntestableError

    async def reproduce(self, under_test: UnderTest) -> Reproduction:
        if isinstance(self.outcome, UntestableError):
            raise self.outcome
        return Reproduction(self.outcome, f"{self.name} was tried", "Linux 1.2")


class UnbootableFinding(FakeFinding):
    """A finding whose machine does not boot, whichever findings of its class are tried."""

    @classmethod
    async def try_all(cls, findings: Sequence[Self], under_test: UnderTest) -> list[Attempt]:
        raise UntestableError("the machine does not boot")


def fake(name: str, outcome: State | UntestableError) -> FakeFinding:
    return FakeFinding(name, "a defect", "Linux 1.2", outcome)


PRESENT = fake("present", State.REPRODUCED)
ABSENT = fake("absent", State.NOT_REPRODUCED)
UNTESTED = fake("untested", UntestableError("no kernel"))
UNBOOTABLE = UnbootableFinding("unbootable", "a defect", "", State.REPRODUCED)


def test_each_finding_is_listed_under_its_name() -> None:
    assert [finding.name for finding in FINDINGS.values()] == list(FINDINGS)
    assert [name for name in FINDINGS if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)] == []
    assert all(finding.title and finding.affects for finding in FINDINGS.values())


@pytest.mark.parametrize(
    ("under_test", "chosen"),
    [
        (UnderTest(), ("l1", "7.3")),
        (UnderTest(kernel="stock"), ("l1", "stock")),
        (UnderTest(kernel_source=Path("tree")), ("l1_of_source", Path("tree"))),
        (UnderTest(kernel_patches=(Path("a"),)), ("l1_of_patches", (Path("a"),))),
    ],
)
def test_a_finding_is_tried_on_the_kernel_that_was_chosen_and_on_no_other(
    under_test: UnderTest, chosen: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    booted: list[tuple[str, object]] = []

    def stand_in(name: str) -> Callable[..., None]:
        def choose(kernel: object, *, falls_back: bool = False) -> None:
            assert not falls_back
            booted.append((name, kernel))
            raise UntestableError("nothing is booted")

        return choose

    for name in ("l1", "l1_of_source", "l1_of_patches"):
        monkeypatch.setattr(linux, name, stand_in(name))
    (attempt,) = asyncio.run(attempts(LINUX_FINDINGS[:1], under_test))
    assert attempt.found == "nothing is booted"
    assert booted == [chosen]


def test_each_proof_of_a_finding_exists_and_shows_only_this_finding() -> None:
    proofs = [name for finding in LINUX_FINDINGS for name in finding.proofs]
    assert set(proofs) <= set(catalog.names())
    assert len(set(proofs)) == len(proofs)


def proof(state: ProofState, *, corrected: bool = False) -> dict[str, Any]:
    return {"name": str(state), "state": state, "corrected": corrected, "found": "bits"}


def test_a_finding_is_judged_by_the_proofs_of_its_own_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    async def stand_in(machine: object, qemu: object, request: Request, *, keep: bool) -> object:
        asked.extend(request.only)
        present, absent = proof(ProofState.HOLDS), proof(ProofState.NOT_SUPPORTED, corrected=True)
        rows = [("one", present), ("two", absent)]
        return {
            "kernel": "1.2",
            "outcomes": [{**row, "group": group, "name": "a proof"} for group, row in rows],
        }

    monkeypatch.setattr(linux, "l1", lambda kernel, *, falls_back: None)
    monkeypatch.setattr(linux, "find_qemu", lambda chosen, arch: None)
    monkeypatch.setattr(linux, "prove_passthrough", stand_in)
    findings = [LinuxFinding(name, "", "", (f"{name}: a proof",)) for name in ("two", "one")]
    tried = asyncio.run(attempts(findings, UnderTest()))
    assert asked == ["two: a proof", "one: a proof"]
    assert [attempt.to_json()["state"] for attempt in tried] == ["not-reproduced", "reproduced"]


SHOWN = proof(ProofState.HOLDS)
CORRECTED = proof(ProofState.NOT_SUPPORTED, corrected=True)
UNSUPPORTED = proof(ProofState.NOT_SUPPORTED)


@pytest.mark.parametrize("others", [[], [CORRECTED], [UNSUPPORTED], [proof(ProofState.FAILS)]])
def test_a_kernel_has_a_defect_that_any_of_its_proofs_shows(others: list[dict[str, Any]]) -> None:
    assert judged([*others, SHOWN], "Linux 1.2").state is State.REPRODUCED


def test_a_kernel_without_iommufd_is_judged_by_the_proofs_that_it_supports() -> None:
    outcome = judged([CORRECTED, UNSUPPORTED], "Linux 1.2")
    assert outcome == Reproduction(State.NOT_REPRODUCED, "lacking: bits", "Linux 1.2")


@pytest.mark.parametrize("state", [ProofState.FAILS, ProofState.UNTESTED])
def test_a_proof_without_a_clear_result_is_no_correct_kernel(state: ProofState) -> None:
    with pytest.raises(UntestableError, match="behaves neither as the finding says nor correctly"):
        judged([CORRECTED, proof(state)], "Linux 1.2")


def test_a_kernel_that_supports_no_proof_is_untested() -> None:
    with pytest.raises(UnsupportedError, match=r"Linux 1\.2 supports none of the proofs"):
        judged([UNSUPPORTED], "Linux 1.2")


def test_a_rule_distinguishes_the_defect_the_correct_and_any_other_behaviour() -> None:
    require_defect(True, False, "0 bits")
    with pytest.raises(ProofFailedError, match="neither the known defect nor correct: 1 bit"):
        require_defect(False, False, "1 bit")

    def corrected() -> tuple[str, dict[str, Any]]:
        require_defect(False, True, "2 bits")
        return "never", {}

    outcome = run("rules", "corrected", corrected)
    assert (outcome.state, outcome.corrected) == (ProofState.NOT_SUPPORTED, True)
    assert outcome.found == "this kernel behaves differently: 2 bits"
    assert outcome.to_json()["corrected"] is True


def test_findings_of_one_class_are_tried_together_and_reported_in_the_given_order() -> None:
    findings = [ABSENT, UNBOOTABLE, PRESENT, UNTESTED]
    tried = asyncio.run(attempts(findings, UnderTest()))
    assert [attempt.finding for attempt in tried] == findings
    assert [attempt.to_json()["state"] for attempt in tried] == [
        *("not-reproduced", "untested", "reproduced", "untested"),
    ]
    assert tried[1].found == "the machine does not boot"


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([ABSENT], 0),
        ([PRESENT], 1),
        ([UNTESTED], 3),
        ([ABSENT, UNTESTED], 3),
        ([ABSENT, UNTESTED, PRESENT], 1),
    ],
)
def test_the_exit_code_says_whether_a_defect_exists(
    findings: list[FakeFinding],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {finding.name: finding for finding in findings}
    monkeypatch.setattr(reproduce, "find_finding", known.__getitem__)
    assert main(["reproduce", *known, "--json", "-"]) == code
    report = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert report["exit_code"] == code
    assert [finding["name"] for finding in report["findings"]] == list(known)


def test_the_text_says_what_was_seen_on_which_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "find_finding", {"present": PRESENT, "u": UNTESTED}.__getitem__)
    assert main(["reproduce", "present", "u"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "REPRODUCED: present (Linux 1.2): a defect",
        "  present was tried",
        "NOT TESTED: untested: a defect",
        "  no kernel",
    ]


def test_a_finding_of_qemu_refuses_each_option_of_the_kernel() -> None:
    class OfQemu(FakeFinding):
        program = Program.QEMU

    finding = OfQemu("of-qemu", "a defect", "QEMU 7.2", State.REPRODUCED)
    finding.refuse_other_programs(UnderTest(qemu="7.2"))
    for option, chosen in {
        "--kernel stock": UnderTest(kernel="stock"),
        "--kernel-source tree": UnderTest(kernel_source=Path("tree")),
        "--kernel-patch a b": UnderTest(kernel_patches=(Path("a"), Path("b"))),
    }.items():
        with pytest.raises(UsageError, match=f"^{option}: the finding of-qemu is about QEMU; "):
            finding.refuse_other_programs(chosen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reproduce needs the name of a finding, or --list alone"),
        (["hwpt-hole", "--list"], "reproduce needs the name of a finding, or --list alone"),
        (["hwpt-whole"], "finding 'hwpt-whole' is not known; choose one of: "),
        (["hwpt-hole", "--qemu", "11.1"], "--qemu 11.1: the finding hwpt-hole is about Linux"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_tried(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_list_has_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list", "--json", "-"]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert [entry["finding"] for entry in entries] == list(FINDINGS)
    assert {entry["program"] for entry in entries} <= set(Program)


def test_the_index_of_findings_names_each_one_with_its_program() -> None:
    rows = re.findall(r"^\| [^|]*`([a-z0-9-]+)`[^|]* \| (\w+) \|", index(), re.MULTILINE)
    assert rows == [(name, finding.program.proper_name) for name, finding in FINDINGS.items()]


def index() -> str:
    return (UPSTREAM / "index.md").read_text()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_each_patch_is_linked_by_the_index(patch: Path) -> None:
    assert f"({patch.relative_to(UPSTREAM)})" in index()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_has_a_short_subject_a_message_and_its_licence(patch: Path) -> None:
    head, _, rest = patch.read_text().partition("\n---\n")
    header, _, message = head.partition("\n\n")
    subject = re.search(r"^Subject: \[PATCH\] (.+)$", header, re.MULTILINE)
    assert subject
    assert len(subject[1]) <= 75
    assert message
    assert [line for line in message.splitlines() if len(line) > 75] == []
    assert "GPL-2.0" in rest.partition("diff --git")[0]
    assert "Signed-off-by:" not in head  # only the submitter can sign


HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_changes_files_in_place_and_its_hunks_are_whole(patch: Path) -> None:
    files = patch.read_text().split("diff --git ")[1:]
    assert files
    for file in files:
        name, old, new, *body = file.splitlines()
        path = name.split()[0].removeprefix("a/")
        assert (name, old, new) == (f"a/{path} b/{path}", f"--- a/{path}", f"+++ b/{path}")
        counts: list[list[int]] = []
        for line in body:
            if found := HUNK.match(line):
                counts.append([int(found[2] or 1), int(found[4] or 1)])
                continue
            counts[-1][0] -= line[0] in " -"
            counts[-1][1] -= line[0] in " +"
        assert counts
        assert {count for hunk in counts for count in hunk} == {0}


def test_the_patches_of_a_program_are_numbered() -> None:
    for folder in {patch.parent for patch in PATCHES}:
        numbers = [int(patch.name[:4]) for patch in PATCHES if patch.parent == folder]
        assert numbers == list(range(1, len(numbers) + 1))
