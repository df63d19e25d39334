"""A report's JSON in the forms that test runners collect: JUnit XML and TAP (version 14).

A proof has four cases: the pages, the guest's own checks, the writes of the device that were not
reported dirty, and the sensitivity of the run. A wrong ring index, a limit of the downtime and the
control each add a case. A soak has the cases of its last migration, and one for each process that
must not grow. Each fault, each cell of a matrix and each passthrough proof is one case.

A case that could not be tested is an error in JUnit and 'not ok' in TAP, because a CI must not take
it for a pass. A case that a QEMU does not support is skipped in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

from ..exit_codes import EXIT_PASS, EXIT_UNTESTED

_STORIES: Final = 100
"""The most pages that one failure describes."""
_ALL_EQUAL: Final = "all pages are equal"
_MATRIX_OUTCOMES: Final = {
    "clean": "passed",
    "lost": "failed",
    "failed": "failed",
    "slow": "failed",
    "skipped": "skipped",
    "untested": "error",
}
_TAGS: Final = {"failed": "failure", "error": "error", "skipped": "skipped"}


@dataclass(frozen=True)
class Case:
    """One test case; `outcome` is 'passed', 'failed', 'skipped' or 'error' (not tested)."""

    name: str
    outcome: str
    message: str = ""
    details: Sequence[str] = ()
    seconds: float | None = None


def cases(answer: Mapping[str, Any]) -> list[Case]:
    """Return the test cases of a report."""
    if answer["kind"] == "prove":
        return _proof_cases(answer)
    if answer["kind"] == "soak":
        return [*_proof_cases(answer["last"]), *map(_growth_case, answer["growth"])]
    if answer["kind"] == "check":
        stories = [page["story"] for page in answer["differences"] if page["known"] is None]
        if answer["exit_code"] == EXIT_UNTESTED:
            return [Case(_ALL_EQUAL, "error", answer["verdict"])]
        return [_pages_case(answer["exit_code"] == EXIT_PASS, answer["verdict"], stories)]
    if answer["kind"] == "faults":
        return [_fault_case(row) for row in answer["faults"]]
    if answer["kind"] == "matrix":
        return [
            Case(cell["name"], _MATRIX_OUTCOMES[cell["state"]], cell["message"], cell["stories"])
            for cell in answer["cells"]
        ]
    if answer["kind"] == "passthrough":
        return [_passthrough_case(row) for row in answer["outcomes"]]
    return [Case(_ALL_EQUAL, "error", answer["verdict"])]


def _growth_case(row: Mapping[str, Any]) -> Case:
    warm, last = json.dumps(row["warm"]), json.dumps(row["last"])
    outcome = "passed" if row["none"] else "failed"
    message = f"after the warm-up: {warm}; at the end: {last}"
    return Case(f"the resource use of the {row['process']} does not grow", outcome, message)


_OF_PASSTHROUGH: Final = {
    "holds": "passed",
    "fails": "failed",
    "lacking": "skipped",
    "untested": "error",
}


def _passthrough_case(row: Mapping[str, Any]) -> Case:
    outcome = _OF_PASSTHROUGH[row["state"]]
    name = f"{row['group']}: {row['name']}"
    return Case(name, outcome, row["found"], seconds=row["seconds"])


def _fault_case(row: Mapping[str, Any]) -> Case:
    untested = [trial["untested"] for trial in row["trials"] if trial["untested"]]
    name = f"{row['fault']} on {row['bench']}"
    if untested:
        return Case(name, "error", untested[0])
    message = f"caught in {row['caught']} of {len(row['trials'])} runs: {row['summary']}"
    return Case(name, "passed" if row["as_wanted"] else "failed", message)


def _pages_case(passed: bool, message: str, stories: Sequence[str]) -> Case:
    if passed:
        return Case(_ALL_EQUAL, "passed", message)
    return Case(_ALL_EQUAL, "failed", message, stories[:_STORIES])


def _downtime_case(downtime: Mapping[str, Any]) -> Case:
    name = "the downtime is within its limit"
    if downtime["seconds"] is None:
        return Case(name, "error", "the downtime could not be measured")
    message = f"{downtime['seconds']:.3f} s, limit {downtime['limit_s']:g} s"
    parts = [f"{part['seconds']:.3f} s: {part['what']}" for part in downtime["parts"]]
    return Case(name, "failed" if downtime["exceeded"] else "passed", message, parts)


def _proof_cases(answer: Mapping[str, Any]) -> list[Case]:
    lost, guest, sensitivity = answer["lost_pages"], answer["guest"], answer["sensitivity"]
    rings, refusal = answer["wrong_rings"], answer["refusal"]
    not_continued = bool(rings or refusal)
    found = [
        _pages_case(not lost, answer["verdict"], [page["story"] for page in lost]),
        Case(
            "the guest continues correctly on the destination",
            "failed" if guest["errors"] or not_continued else "passed",
            f"{guest['requests']} requests, {guest['errors']} errors"
            + (", not continued" if not_continued else ""),
            [*guest["error_messages"], *([refusal] if refusal else [])],
        ),
        Case(
            "a lost dirty bit would have been detected",
            "passed" if sensitivity["rewritten"] else "error",
            f"{sensitivity['rewritten']} pages were written after QEMU had sent them, and a loss "
            f"is guaranteed detectable on {sensitivity['guaranteed_detectable']} of them",
        ),
    ]
    if sensitivity["unreported"] is not None:
        unreported = Case(
            "every page that the device wrote is reported dirty",
            "failed" if sensitivity["unreported"] else "passed",
            f"{sensitivity['unreported']} of {sensitivity['written']} pages were never reported",
        )
        found.insert(2, unreported)
    if (log := answer["log"]) is not None:
        late, unlogged = len(log["late_bits"]), len(log["unlogged_queues"])
        logged = Case(
            "the device sets its bits in QEMU's dirty log in time",
            "failed" if late or unlogged else "passed",
            f"{late} dirty bits were late, {unlogged} used rings were never logged",
        )
        found.insert(2, logged)
    if (downtime := answer["downtime"])["limit_s"] is not None:
        found.append(_downtime_case(downtime))
    if rings:
        stories = [ring["story"] for ring in rings]
        found.append(
            Case("every ring index is right", "failed", f"{len(rings)} rings are wrong", stories)
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
    """Return JUnit XML with one suite, which has the set-up as properties."""
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
    """Replace the characters that XML 1.0 does not allow; a guest's console may contain them."""
    return "".join(
        character
        if character in "\t\n" or (character >= " " and character not in "\ufffe\uffff")
        else "�"
        for character in text
    )


def to_tap(answer: Mapping[str, Any]) -> str:
    """Return TAP 14, with a YAML block for each case that did not pass."""
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
