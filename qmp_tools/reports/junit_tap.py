"""A report's JSON as what test runners collect: JUnit XML and TAP (version 14).

A proof is four cases: the pages, the guest's own checks, what the device wrote and did not report,
and whether the run could tell anything at all; there is one more for a ring whose index is wrong,
for a limit of the downtime and for the control. A soak is the cases of its last migration, and one
for each process that may not grow. A fault, a matrix' cell, and each proof of the passthrough
route, is a case of its own. What could not be tested is an error in JUnit, and 'not ok' in TAP,
because a CI that takes it for a pass would be wrong; what a QEMU lacks is skipped in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

from ..exit_codes import EXIT_PASS, EXIT_UNTESTED

_STORIES: Final = 100
"""So many pages are told of in one failure."""
_MATRIX_OUTCOMES: Final = {
    "clean": "passed",
    "lost": "failed",
    "slow": "failed",
    "skipped": "skipped",
    "untested": "error",
}
_TAGS: Final = {"failed": "failure", "error": "error", "skipped": "skipped"}


@dataclass(frozen=True)
class Case:
    """One test case; `outcome` is 'passed', 'failed', 'skipped' or 'error' (not to be tested)."""

    name: str
    outcome: str
    message: str = ""
    details: Sequence[str] = ()
    seconds: float | None = None


def cases(answer: Mapping[str, Any]) -> list[Case]:
    """The test cases that a report stands for."""
    if answer["kind"] == "prove":
        return _proof_cases(answer)
    if answer["kind"] == "soak":
        return [*_proof_cases(answer["last"]), *map(_growth_case, answer["growth"])]
    if answer["kind"] == "check":
        stories = [page["story"] for page in answer["differences"] if page["known"] is None]
        if answer["exit_code"] == EXIT_UNTESTED:
            return [Case("every page equal", "error", answer["verdict"])]
        return [_pages_case(answer["exit_code"] == EXIT_PASS, answer["verdict"], stories)]
    if answer["kind"] == "faults":
        return [_fault_case(row) for row in answer["faults"]]
    if answer["kind"] == "matrix":
        return [
            Case(it["name"], _MATRIX_OUTCOMES[it["state"]], it["message"], it["stories"])
            for it in answer["cells"]
        ]
    if answer["kind"] == "passthrough":
        return [_passthrough_case(row) for row in answer["outcomes"]]
    if answer["kind"] == "passthrough-matrix":
        return [
            _passthrough_case(row, f"kernel {run['kernel']}, QEMU {run['qemu']}: ")
            for run in answer["runs"]
            for row in run["outcomes"]
        ]
    return [Case("every page equal", "error", answer["verdict"])]


def _growth_case(row: Mapping[str, Any]) -> Case:
    warm, last = (json.dumps(row[it]) for it in ("warm", "last"))
    outcome = "passed" if row["none"] else "failed"
    return Case(f"the {row['process']} does not grow", outcome, f"{warm} when warm, then {last}")


_OF_PASSTHROUGH: Final = {
    "holds": "passed",
    "fails": "failed",
    "lacking": "skipped",
    "untested": "error",
}


def _passthrough_case(row: Mapping[str, Any], where: str = "") -> Case:
    outcome = _OF_PASSTHROUGH[row["state"]]
    name = f"{where}{row['group']}: {row['name']}"
    return Case(name, outcome, row["found"], seconds=row["seconds"])


def _fault_case(row: Mapping[str, Any]) -> Case:
    untested = [trial["untested"] for trial in row["trials"] if trial["untested"]]
    name = f"{row['fault']} on {row['bench']}"
    if untested:
        return Case(name, "error", untested[0])
    told = f"{row['caught']} of {len(row['trials'])} runs: {row['summary']}"
    return Case(name, "passed" if row["as_wanted"] else "failed", told)


def _pages_case(passed: bool, message: str, stories: Sequence[str]) -> Case:
    if passed:
        return Case("every page equal", "passed", message)
    return Case("every page equal", "failed", message, stories[:_STORIES])


def _downtime_case(downtime: Mapping[str, Any]) -> Case:
    name = "the downtime is within its limit"
    if downtime["seconds"] is None:
        return Case(name, "error", "it could not be measured")
    told = f"{downtime['seconds']:.3f} s, of {downtime['limit_s']:g} s"
    parts = [f"{part['seconds']:.3f} s: {part['what']}" for part in downtime["parts"]]
    return Case(name, "failed" if downtime["exceeded"] else "passed", told, parts)


def _proof_cases(answer: Mapping[str, Any]) -> list[Case]:
    lost, guest, sensitivity = answer["lost_pages"], answer["guest"], answer["sensitivity"]
    rings, refusal = answer["wrong_rings"], answer["refusal"]
    not_continued = bool(rings or refusal)
    found = [
        _pages_case(not lost, answer["verdict"], [page["story"] for page in lost]),
        Case(
            "the guest goes on correctly",
            "failed" if guest["errors"] or not_continued else "passed",
            f"{guest['requests']} requests, {guest['errors']} errors"
            + (", not continued" if not_continued else ""),
            [*guest["error_messages"], *([refusal] if refusal else [])],
        ),
        Case(
            "a loss would have shown",
            "passed" if sensitivity["rewritten"] else "error",
            f"{sensitivity['rewritten']} pages written after they were sent, "
            f"{sensitivity['guaranteed_detectable']} of them certain to show",
        ),
    ]
    if sensitivity["unreported"] is not None:
        unreported = Case(
            "every page that the device wrote is reported",
            "failed" if sensitivity["unreported"] else "passed",
            f"{sensitivity['unreported']} of {sensitivity['written']} are not",
        )
        found.insert(2, unreported)
    if (log := answer["log"]) is not None:
        late, unlogged = len(log["late_bits"]), len(log["unlogged_queues"])
        logged = Case(
            "the device has kept QEMU's log in time",
            "failed" if late or unlogged else "passed",
            f"{late} late dirty bits, {unlogged} used rings that were never logged",
        )
        found.insert(2, logged)
    if (downtime := answer["downtime"])["limit_s"] is not None:
        found.append(_downtime_case(downtime))
    if rings:
        stories = [ring["story"] for ring in rings]
        found.append(
            Case("every ring's index is right", "failed", f"{len(rings)} are not", stories)
        )
    if "control" in answer:
        caught = answer["control"]["caught"]
        fault = answer["control"]["setup"]["fault"]
        outcome = "passed" if caught else "error"
        found.append(Case("the injected fault is caught", outcome, fault))
    return found


def _properties(answer: Mapping[str, Any]) -> dict[str, str]:
    found = {"verdict": answer["verdict"]}
    for side in ("source", "destination"):
        if side in answer:
            found[f"qemu_{side}"] = answer[side]["version"]
    for name, value in answer.get("setup", {}).items():
        if isinstance(value, (str, int, float)):
            found[name] = str(value)
    return found


def to_junit(answer: Mapping[str, Any]) -> str:
    """JUnit XML: one suite, its set-up as properties."""
    found = cases(answer)
    suite = ElementTree.Element("testsuite", name="dmaproof", tests=str(len(found)))
    for attribute, outcome in (("failures", "failed"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(case.outcome == outcome for case in found)))
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(answer).items():
        ElementTree.SubElement(properties, "property", name=name, value=_printable(value))
    for case in found:
        element = ElementTree.SubElement(
            suite, "testcase", classname=f"dmaproof.{answer['kind']}", name=case.name
        )
        if case.seconds is not None:
            element.set("time", str(case.seconds))
        if case.outcome != "passed":
            tag = _TAGS[case.outcome]
            problem = ElementTree.SubElement(element, tag, message=_printable(case.message))
            problem.text = _printable("\n".join(case.details))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """`text` without the characters that XML 1.0 cannot hold (a guest's console may have them)."""
    return "".join(
        it if it in "\t\n" or (it >= " " and it not in "\ufffe\uffff") else "�" for it in text
    )


def to_tap(answer: Mapping[str, Any]) -> str:
    """TAP 14, with a YAML block for what did not pass."""
    found = cases(answer)
    lines = ["TAP version 14", f"1..{len(found)}"]
    for number, case in enumerate(found, 1):
        ok = "ok" if case.outcome in ("passed", "skipped") else "not ok"
        skip = f" # SKIP {case.message.splitlines()[0]}" if case.outcome == "skipped" else ""
        lines.append(f"{ok} {number} - {case.name}{skip}")
        if ok == "not ok":
            # A JSON string is a YAML string.
            lines += ["  ---", f"  severity: {case.outcome}", f"  message: {_yaml(case.message)}"]
            lines += ["  data:"] * bool(case.details)
            lines += [f"    - {_yaml(detail)}" for detail in case.details]
            lines += ["  ..."]
    return "\n".join(lines) + "\n"


def _yaml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
