"""All reports of an outcome agree, and the JSON conforms to its schema."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import jsonschema
import numpy as np
import pytest

from dmaproof.evidence import HARVEST
from dmaproof.trace import Link
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.devices.device import DeviceFacts
from qmp_tools.devices.emulated import EmulatedDevice
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.guest.workload import Workload
from qmp_tools.matrix.axes import Matrix
from qmp_tools.matrix.result import Result, State, result_of, skipped, untested
from qmp_tools.migration.downtime import Downtime, Part, downtime_parts
from qmp_tools.migration.judgement import Blame, EvidenceSource
from qmp_tools.migration.log_watch import LogEvidence
from qmp_tools.migration.migration import Progress, parse_progress
from qmp_tools.proof.attribution import LostPage
from qmp_tools.proof.model import Proof, Setup
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.ram_map import MapArea, RamMap, run_lengths, with_lost
from qmp_tools.proof.rings import Ring
from qmp_tools.proof.sensitivity import Sensitivity, sensitivity_by_guest
from qmp_tools.proof.soak import Holdings, Soak
from qmp_tools.proof.verdict import GuestOutcome, Verdict
from qmp_tools.qemu.machine import Machine
from qmp_tools.ram_check.guest import Side
from qmp_tools.ram_check.outcome import Check, ComparedArea, Difference, NotCompared
from qmp_tools.reports import check_report, matrix_report, report, soak_report
from qmp_tools.reports.html import to_html
from qmp_tools.reports.html_charts import ram_drawing, timeline
from qmp_tools.reports.junit_tap import to_junit, to_tap
from qmp_tools.reports.precopy import harvest_list, passes
from qmp_tools.reports.report import SCHEMA_VERSION

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

PAGES = 64
SECOND = 1_000_000_000
LOST = [
    LostPage(
        ram_offset=0x5000,
        gpa=0x5000,
        bytes_differing=9,
        blame=Blame.DEVICE,
        link=Link.ITERATOR,
        iova=0x5000,
        request=7,
        queue=1,
        kind="data",
        seconds=1.5,
        due_in_harvest=3,
        last_seen_in_harvest={"tracker": 3, "iterator": 0, "translation": 0, "log": 0},
    ),
    LostPage(ram_offset=0x9000, gpa=None, bytes_differing=1, blame=Blame.ACCELERATOR),
]
SENSITIVE = Sensitivity(40, 20, 10, 5, 0, 0, 0)


def progress(seconds: float, syncs: int, transferred: int, remaining: int) -> Progress:
    ram = {"dirty-sync-count": syncs, "transferred": transferred, "remaining": remaining}
    answer = parse_progress({"status": "active", "ram": {**ram, "total": 1 << 20}})
    return replace(answer, time_ns=round(seconds * SECOND))


HISTORY = [
    progress(10.0, 1, 0, 900),
    progress(10.5, 1, 600, 300),
    progress(11.0, 2, 800, 500),
    progress(11.5, 4, 1000, 100),
    progress(12.0, 4, 1300, 0),
]
HARVESTS = np.array(
    [
        (1, 9.9 * SECOND, 1000, 4, 4),
        (2, 10.6 * SECOND, 1000, 10, 8),
        (3, 11.1 * SECOND, 1000, 6, 6),
        (4, 11.96 * SECOND, 0.01 * SECOND, 3, 3),
    ],
    dtype=HARVEST,
)
WRONG_RING = Ring("source", "virtio-blk", 1, 128, answered=97, used=100, available=101)
OPTIONS = DeviceOptions(seed=3)
FAULT = "drop-pages=0.01"
MOMENTS = {"STOP": round(11.98 * SECOND), "completed": round(12.0 * SECOND)}


class Foreign(EmulatedDevice):
    """A device that keeps no journal."""

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts("third-party", 1)


class Network(Foreign):
    """A device that writes to buffers of the guest's kernel."""

    @property
    def direct(self) -> bool:
        return False


class FakeDriver(EmulatedDevice):
    """A device whose tracker is not harvested by dmaproof."""

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts("vfio-fake", 0, tracker="iommufd")


def proof(
    lost: list[LostPage],
    sensitivity: Sensitivity = SENSITIVE,
    errors: int = 0,
    device: EmulatedDevice | None = None,
    downtime: Downtime | None = None,
    wrong_rings: Sequence[Ring] = (),
    refusal: str | None = None,
) -> Proof:
    classes = np.zeros(PAGES, dtype=np.uint8)
    classes[8:12] = 2
    for page in lost:
        classes[page.ram_offset // 4096] = 3
    meanings = {name: f"what {name} means" for name in ("other", "device", "late", "lost")}
    guest = GuestOutcome(1000, errors, 10, ["error <bad> & \x1b[0m"] if errors else [])
    return Proof(
        setup=Setup(
            options=ProofOptions(guest="bare", seed=3),
            qemu=Path("/usr/bin/qemu"),
            qemu_destination=Path("/usr/bin/qemu"),
            machine=Machine(X86_64, "q35", "tcg", 64 << 20, 2, Path("kernel")),
            guest="bare",
            workload=Workload(seed=3),
            device=device or EmulatedDevice(OPTIONS if not lost else replace(OPTIONS, fault=FAULT)),
        ),
        verdict=Verdict(
            PAGES,
            lost,
            sensitivity,
            guest,
            downtime=downtime or Downtime(),
            wrong_rings=wrong_rings,
            refusal=refusal,
        ),
        qemu_version="9.2.0",
        qemu_destination_version="9.2.0",
        boot_s=1.0,
        migration_s=2.0,
        compare_s=0.1,
        downtime_s=0.05,
        history=HISTORY,
        moments=MOMENTS,
        harvests=HARVESTS,
        ram_map=RamMap(meanings, [MapArea("ram", 0, 0, classes)]),
        commands={"source QEMU": ["qemu", "-append", "a b <c>"]},
        folder=None,
    )


LOG = LogEvidence(looks=900, look_interval_s=0.002, judged_queues=[0, 1])


def watched(log: LogEvidence, *lost: LostPage) -> Proof:
    """Return the proof of a third-party device whose log was watched."""
    found = proof(list(lost), sensitivity_by_guest(5), device=Foreign(OPTIONS))
    return replace(found, verdict=replace(found.verdict, settled_s=4.0, log=log))


def check(
    differing: list[int],
    known: list[int],
    discarded: tuple[int, ...] = (),
    undecided: tuple[int, ...] = (),
) -> Check:
    side = Side("/run/qmp", 4711, "9.2.0", "paused", "kvm", 48 << 20, 12 << 20, 4 << 20)
    pages = sorted(differing + known)
    return Check(
        source=side,
        destination=side,
        areas=[
            ComparedArea(
                0,
                "m0",
                0,
                16,
                np.array([page for page in pages if page < 16], dtype=np.int64),
                np.array(discarded, dtype=np.int64),
                np.array(undecided, dtype=np.int64),
            ),
            ComparedArea(
                16 * 4096,
                "m0",
                16 * 4096,
                16,
                np.array([page - 16 for page in pages if page >= 16], dtype=np.int64),
            ),
            ComparedArea(1 << 32, "m1", 0, 8, np.array([], dtype=np.int64)),
        ],
        differences=[
            Difference(page * 4096, "m0", page * 4096, 3, None, "pvclock", "the firmware’s clock")
            if page in known
            else Difference(page * 4096, "m0", page * 4096, 3, "dimm0")
            for page in pages
        ],
        not_compared=[NotCompared("m1", 0xA0000, 0x20000, "hidden, in private memory")],
        notes=["the source reports no completed migration"],
        compare_s=0.2,
        discarders=["balloon b"] if discarded or undecided else [],
    )


def soak(last: Proof, descriptors: list[int]) -> Soak:
    migrations = [proof([]).migration_summary] * (len(descriptors) - 1)
    seen = [Holdings(20 << 20, number, 3) for number in descriptors]
    return Soak(len(descriptors), replace(last, earlier=migrations), {"device": seen}, 60.0)


UNTESTED = {
    "schema_version": SCHEMA_VERSION,
    "kind": "prove-untested",
    "verdict": "could not be tested: no QEMU",
    "exit_code": 3,
}
CELLS = [
    Result(State.CLEAN, "all pages are equal", (), (), ("7.2", "8.0"), 8192, 3, 2.5, ["dmaproof"]),
    Result(State.LOST, "3 of 9 pages were lost", ["device"], ["GPA 0x7000: <bad>"], seed=3),
    skipped("source QEMU refused it:\nno TLS"),
    untested("the guest did not come up"),
]
MATRIX = Matrix({"qemu": ["7.2", "8.0"], "scenario": ["unix", "tls"], "guest": ["bare"]})
SLOW = [Part("the <device> stops", 40.0), Part("the destination loads", 0.5)]
ANSWERS: dict[str, dict[str, Any]] = {
    "matrix": matrix_report.to_json(MATRIX, CELLS),
    "pass": report.to_json(proof([])),
    "lost": report.to_json(proof(LOST, errors=2)),
    "slow": report.to_json(proof([], downtime=Downtime(SLOW, 2.0))),
    "quick": report.to_json(proof([], downtime=Downtime(SLOW, 60.0))),
    "unmeasured": report.to_json(proof([], downtime=Downtime((), 2.0))),
    "insensitive": report.to_json(proof([], Sensitivity(0, 0, 0, 0, 0, 0, 0))),
    "driver": report.to_json(proof([], device=FakeDriver(OPTIONS))),
    "foreign": report.to_json(
        proof([], sensitivity_by_guest(5, guaranteed=True), device=Foreign(OPTIONS))
    ),
    "foreign, lost": report.to_json(
        proof(
            [LostPage(0x9000, 0x9000, 1, Blame.UNKNOWN)],
            sensitivity_by_guest(0, guaranteed=True),
            device=Foreign(OPTIONS),
        )
    ),
    "watched": report.to_json(watched(LOG)),
    "watched, late": report.to_json(watched(replace(LOG, late_bits=[0x3000]))),
    "watched, lost": report.to_json(
        watched(
            replace(LOG, early_bits=[0x9000], unlogged_queues=[1]),
            LostPage(0x9000, 0x9000, 1, Blame.EARLY_BIT),
            LostPage(0x5000, 0x5000, None, Blame.LATE_DMA),
        )
    ),
    "wrong ring": report.to_json(
        proof([], wrong_rings=[WRONG_RING], refusal="VQ 0 size 0x80 < last_avail_idx")
    ),
    "control": {
        **report.to_json(proof([])),
        "control": {**report.to_json(proof(LOST)), "caught": True},
    },
    "equal": check_report.to_json(check([], [])),
    "known": check_report.to_json(check([], [3])),
    "differs": check_report.to_json(check([5, 6, 20], [3])),
    "discarded": check_report.to_json(check([], [3], (8, 9, 11))),
    "undecided": check_report.to_json(check([], [3], (8, 9), (10,))),
    "soak": soak_report.soak_to_json(soak(proof([]), [8, 9, 9, 9])),
    "grown": soak_report.soak_to_json(soak(proof([]), [8, 9, 10, 11])),
    "lost in the long run": soak_report.soak_to_json(soak(proof(LOST), [9, 9, 9, 9])),
    "untested": UNTESTED,
}
CASES = {
    "matrix": ["passed", "failed", "skipped", "error"],
    "pass": ["passed"] * 3,
    "lost": ["failed", "failed", "passed"],
    "slow": ["passed"] * 4 + ["failed"],
    "quick": ["passed"] * 5,
    "unmeasured": ["passed"] * 4 + ["error"],
    "insensitive": ["passed", "passed", "passed", "error"],
    "driver": ["passed"] * 3,
    "foreign": ["passed"] * 3,
    "foreign, lost": ["failed", "passed", "error"],
    "watched": ["passed"] * 4,
    "watched, late": ["passed", "passed", "failed", "passed"],
    "watched, lost": ["failed", "passed", "failed", "passed"],
    "wrong ring": ["passed", "failed", "passed", "passed", "failed"],
    "control": ["passed"] * 3,
    "equal": ["passed"],
    "known": ["passed"],
    "differs": ["failed"],
    "discarded": ["passed"],
    "undecided": ["error"],
    "soak": ["passed"] * 5,
    "grown": ["passed"] * 4 + ["failed"],
    "lost in the long run": ["failed", *["passed"] * 4],
    "untested": ["error"],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_json_conforms_to_its_schema(name: str) -> None:
    answer = json.loads(json.dumps(ANSWERS[name]))
    VALIDATOR.validate(answer)
    for member in answer:
        if member not in ("control", "commands"):
            without = {key: value for key, value in answer.items() if key != member}
            assert not VALIDATOR.is_valid(without), member


def test_a_cell_can_have_every_blame() -> None:
    answer: Any = copy.deepcopy(ANSWERS["matrix"])
    answer["cells"][1]["blame"] = [
        *map(str, Blame),
        *("unreported", "late-bits", "unlogged-ring", "guest"),
    ]
    VALIDATOR.validate(json.loads(json.dumps(answer)))


def test_the_schema_refuses_wrong_values() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for path, value in (
        (("lost_pages", 0, "blame"), "gremlins"),
        (("ram_map", "areas", 0, "runs", 0), [1]),
        (("migration", "harvests", 0, "merged_pages"), -1),
        (("setup", "seed"), "three"),
    ):
        answer: Any = copy.deepcopy(ANSWERS["lost"])
        place = answer
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        assert not VALIDATOR.is_valid(answer), path


class Page(HTMLParser):
    """A parser that requires that every tag is closed, and that the page fetches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        assert not {name for name, _ in attrs} & {"src", "href", "srcset"}
        if tag not in ("meta", "br", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert tag in ("path", "rect"), tag

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", ANSWERS)
def test_the_page_is_complete_and_self_contained(name: str) -> None:
    html = to_html(ANSWERS[name])
    page = Page()
    page.feed(html)
    assert page.open == []
    assert ANSWERS[name]["verdict"][1:] in page.text
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "nan" not in re.findall(r'[dxy]="[^"]*"', html)


HOSTILE = """<script>'&" src="x"""


def hostile(value: Any, names: set[str]) -> Any:
    """Return `value` with markup in every text except `names`, which the templates look up."""
    if isinstance(value, dict):
        return {key: hostile(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each, names) for each in value]
    return value + HOSTILE if isinstance(value, str) and value not in names else value


@pytest.mark.parametrize("name", ANSWERS)
def test_texts_of_the_json_are_escaped(name: str) -> None:
    answer = json.loads(json.dumps(ANSWERS[name]))
    classes = {kind["name"] for kind in answer.get("ram_map", {"classes": []})["classes"]}
    html = to_html(hostile(answer, {answer["kind"], *State, *EvidenceSource, *classes}))
    page = Page()
    page.feed(html)
    assert page.open == []
    assert answer["verdict"][1:] + HOSTILE in page.text
    assert HOSTILE not in html


@pytest.mark.parametrize("name", ["pass", "equal", "matrix"])
def test_json_without_a_required_member_makes_no_page(name: str) -> None:
    member = "counts" if name == "matrix" else "pages"
    answer = {key: value for key, value in ANSWERS[name].items() if key != member}
    with pytest.raises(jinja2.UndefinedError, match=member):
        to_html(answer)


def test_labels_of_bitmap_syncs_do_not_overlap() -> None:
    migration = ANSWERS["pass"]["migration"]
    (one, *_) = migration["passes"]
    many = [{**one, "sync": number, "began_s": number / 100} for number in range(201)]
    syncs = timeline({**migration, "passes": many})["syncs"]
    assert len(syncs) == 200, "the part before the first sync is not a sync"
    labels = [place for place, is_labelled, _ in syncs if is_labelled]
    assert len(labels) > 20
    assert np.diff(labels).min() >= 26


def test_a_cell_of_the_map_shows_its_most_serious_page() -> None:
    classes = np.zeros(8192, dtype=np.uint8)
    classes[[5, 6]] = [3, 1]
    classes[4100] = 2
    names = ("other", "device", "late", "lost")
    ram_map = RamMap(dict.fromkeys(names, ""), [MapArea("ram", 1 << 32, 0, classes)])
    drawing = ram_drawing(ram_map.to_json())
    (area,) = drawing["areas"]
    assert drawing["pages_a_cell"] == 4
    assert [area["cells"][name] for name in names[1:]] == [[], [1025], [1]]
    assert len(area["cells"]["other"]) == 2046
    assert area["rows"][0] == (1 << 32, "254 other, 1 device, 1 lost")
    assert area["rows"][16] == ((1 << 32) + (4096 << 12), "255 other, 1 late")


def test_the_html_page_shows_the_lost_pages() -> None:
    page = Page()
    page.feed(to_html(ANSWERS["lost"]))
    for expected in (
        "0x5000",
        "the bitmap iterator",
        "accelerator",
        "qemu -append 'a b <c>'",
        "injected",
    ):
        assert expected in page.text


def test_a_report_without_a_journal_does_not_mention_it() -> None:
    page = Page()
    page.feed(to_html(ANSWERS["foreign"]))
    text = report.to_text(
        proof([], sensitivity_by_guest(5, guaranteed=True), device=Foreign(OPTIONS))
    )
    for report_text in (page.text, text):
        assert "third-party, without a journal" in report_text
        assert "None" not in report_text
    assert "wrote 5 pages exactly once" in text


def test_pages_that_were_lost_late_are_in_the_map_too() -> None:
    (area,) = with_lost(
        proof([]).ram_map,
        [LostPage(at, at, None, Blame.LATE_DMA) for at in (0x2000, PAGES * 4096)],
    ).areas
    assert run_lengths(area.classes)[:4] == [[0, 2], [3, 1], [0, 5], [2, 4]]


def test_the_report_says_what_could_not_have_been_detected() -> None:
    page = Page()
    page.feed(to_html(ANSWERS["watched"]))
    unseen = watched(LOG).verdict.unseen
    assert len(unseen) == 4
    for report_text in (page.text, report.to_text(watched(LOG))):
        for each in unseen:
            assert each in report_text


@pytest.mark.parametrize(
    ("name", "blame"),
    [("watched, late", ["late-bits"]), ("watched, lost", ["late-dma", "early-bit"])],
)
def test_a_matrix_names_the_blame_of_a_watched_device(name: str, blame: list[str]) -> None:
    assert result_of(ANSWERS[name], 1.0).blame == blame


@pytest.mark.parametrize("name", ANSWERS)
def test_junit_and_tap_agree(name: str) -> None:
    suite = ElementTree.fromstring(to_junit(ANSWERS[name]))
    outcomes = []
    for case in suite.iter("testcase"):
        kinds = [child.tag for child in case]
        outcomes.append({"failure": "failed"}.get(kinds[0], kinds[0]) if kinds else "passed")
    expected = CASES[name]
    assert outcomes[: len(expected)] == expected
    assert suite.get("failures") == str(outcomes.count("failed"))
    assert suite.get("errors") == str(outcomes.count("error"))
    assert suite.get("skipped") == str(outcomes.count("skipped"))
    assert suite.get("tests") == str(len(outcomes))
    tap = to_tap(ANSWERS[name]).splitlines()
    assert tap[:2] == ["TAP version 14", f"1..{len(outcomes)}"]
    lines = [line for line in tap if re.match(r"(not )?ok \d", line)]
    skipped = [bool(re.match(r"ok \d+ - .* # SKIP .", line)) for line in lines]
    assert skipped == [outcome == "skipped" for outcome in outcomes]
    passed = [line.startswith("ok") for line in lines]
    assert passed == [outcome in ("passed", "skipped") for outcome in outcomes]


def test_the_page_of_a_matrix_has_a_note_for_each_cell_that_is_not_clean() -> None:
    page = Page()
    page.feed(to_html(ANSWERS["matrix"]))
    for expected in (
        "7.2 → 7.2",
        "LOST: device 1",
        "no TLS",
        "GPA 0x7000: <bad>",
        "did not come up",
    ):
        assert expected in page.text


def test_a_wrong_ring_and_the_refusal_of_qemu_are_in_every_report() -> None:
    it = proof([], wrong_rings=[WRONG_RING, WRONG_RING], refusal="VQ 0 size 0x80 < last_avail_idx")
    answer = report.to_json(it)
    assert answer["exit_code"] == 1
    assert answer["verdict"] == f"the indices of 2 rings are wrong: {WRONG_RING.story}"
    text = report.to_text(it)
    assert "the guest was not continued" in text
    page = Page()
    page.feed(to_html(answer))
    for report_text in (text, page.text, to_junit(answer), to_tap(answer)):
        assert "with 97, at least 3 too low" in report_text
        assert "VQ 0 size 0x80" in report_text


def test_a_refusal_without_a_comparison_does_not_claim_one() -> None:
    unreported = replace(SENSITIVE, unreported=2)
    verdict = Verdict(0, [], unreported, GuestOutcome(0, 0, 0), refusal="VQ 0")
    assert verdict.exit_code == 1
    assert "no page was compared" in verdict.sentence


def test_a_control_that_is_not_caught_is_not_a_pass() -> None:
    answer = {**ANSWERS["control"], "control": {**ANSWERS["control"]["control"], "caught": False}}
    suite = ElementTree.fromstring(to_junit(answer))
    assert suite.get("errors") == "1"
    assert "not ok 5 - the injected fault is caught" in to_tap(answer)


def test_passes_contain_their_harvests_and_bytes() -> None:
    found = passes(HISTORY, harvest_list(HARVESTS, HISTORY[0].time_ns))
    assert [each["sync"] for each in found] == [1, 2, 4]
    assert [each["harvested_pages"] for each in found] == [14, 6, 3]
    assert [each["merged_pages"] for each in found] == [12, 6, 3]
    assert [each["sent_bytes"] for each in found] == [800, 200, 300]
    assert sum(each["harvests"] for each in found) == len(HARVESTS)


def test_the_report_has_every_part_of_the_downtime() -> None:
    parts = downtime_parts(MOMENTS, HARVESTS, 0.05)
    assert [part["seconds"] for part in parts] == pytest.approx([0.01, 0.01, 0.01, 0.02])
    assert parts[1]["what"] == "the device harvests for the last time"
    later = downtime_parts({**MOMENTS, "device": MOMENTS["STOP"] + 5_000_000}, HARVESTS, 0.05)
    assert [part["seconds"] for part in later] == pytest.approx([0.01, 0.01, 0.01, 0.005, 0.015])
    assert downtime_parts({}, HARVESTS, 0.05) == []
    assert downtime_parts(MOMENTS, HARVESTS, None) == []


def test_a_downtime_that_is_too_long_is_in_every_report() -> None:
    answer = ANSWERS["slow"]
    assert answer["exit_code"] == 1
    assert answer["downtime"]["exceeded"] is True
    text = report.to_text(proof([], downtime=Downtime(SLOW, 2.0)))
    for report_text in (text, answer["verdict"], to_html(answer), to_junit(answer), to_tap(answer)):
        assert "40" in report_text
        assert "device" in report_text
    page = to_html(answer)
    assert "the &lt;device&gt; stops" in page
    assert "more than the 2000 ms that are allowed" in page
    assert 'failures="1"' in to_junit(answer)
    assert "not ok 5 - the downtime is within its limit" in to_tap(answer)


def test_a_downtime_within_its_limit_is_reported_too() -> None:
    answer = ANSWERS["quick"]
    assert answer["exit_code"] == 0
    assert "\nok 5 - the downtime is within its limit" in to_tap(answer)
    assert "within the 60000 ms that are allowed" in to_html(answer)
    assert "within the 60 s" in report.to_text(proof([], downtime=Downtime(SLOW, 60.0)))


def test_a_downtime_that_was_not_measured_is_not_a_pass() -> None:
    answer = ANSWERS["unmeasured"]
    assert answer["exit_code"] == 3
    assert "could not be measured" in answer["verdict"]
    assert 'errors="1"' in to_junit(answer)


def test_a_soak_reports_which_migration_lost_pages() -> None:
    text = soak_report.soak_to_text(soak(proof(LOST), [9, 9, 9]))
    assert text.startswith("FAIL: migration 3 of 3: 2 of 64 pages were lost")
    assert soak_report.soak_to_text(soak(proof([]), [8, 9, 9])).startswith(
        "PASS: all pages are equal"
    )


def test_a_soak_reports_growth_in_figures() -> None:
    rows = soak_report.growth_rows(soak(proof([]), [8, 9, 10, 11]).growths)
    assert ["device", "file descriptors", "9", "11", "+2"] in rows
    assert ["device", "private memory", "20480 KiB", "20480 KiB", "+0 KiB"] in rows


def test_a_proof_reports_the_migrations_before_it() -> None:
    before = proof([])
    text = report.to_text(
        replace(before, earlier=[before.migration_summary, before.migration_summary])
    )
    assert (
        "2 earlier migrations between source and destination: 128 pages compared, 10 guaranteed "
        in text
    )


def test_the_restart_of_the_destination_s_device_is_reported() -> None:
    before = proof([], device=EmulatedDevice(OPTIONS, destination_killed=True))
    guest = replace(before.verdict.guest, awaiting_restart=4)
    restarted = replace(before, verdict=replace(before.verdict, guest=guest))
    assert "4 requests awaited the restarted device" in report.to_text(restarted)
    assert report.to_json(restarted)["guest"]["awaiting_restart"] == 4
    assert "the destination's device was not killed after the failure" in report.to_text(before)
    assert "restart " not in report.to_text(proof([]))


def test_run_lengths_hold_every_page() -> None:
    classes = np.array([0, 0, 3, 1, 1, 1], dtype=np.uint8)
    assert run_lengths(classes) == [[0, 2], [3, 1], [1, 3]]
    assert run_lengths(classes[:0]) == []


def test_the_map_of_a_check_joins_consecutive_areas() -> None:
    ram_map = ANSWERS["differs"]["ram_map"]
    assert [(area["gpa"], area["pages"]) for area in ram_map["areas"]] == [(0, 32), (1 << 32, 8)]
    runs = [[0, 3], [2, 1], [0, 1], [4, 2], [0, 13], [4, 1], [0, 11]]
    assert ram_map["areas"][0]["runs"] == runs
    assert [kind["pages"] for kind in ram_map["classes"]] == [36, 0, 1, 0, 3]


def test_the_text_of_a_check_joins_runs_and_names_known_differences() -> None:
    text = check_report.to_text(check([5, 6, 20], [3]))
    assert text.startswith("FAIL: 3 of 40 pages differ; in addition, 1 known to differ")
    assert "GPA 0x5000 to 0x6fff (m0 +0x5000, DIMM dimm0): 6 bytes differ in 2 pages" in text
    assert "GPA 0x3000 (m0 +0x3000): 3 bytes differ (pvclock): the firmware’s clock" in text
    assert "not compared m1 0xa0000 to 0xbffff: hidden, in private memory" in text
    assert check([], [3]).exit_code == 0
    assert check([5], [3]).exit_code == 1


def test_a_check_counts_pages_that_the_guest_gave_back_separately() -> None:
    sound = check([], [], (8, 9, 11))
    assert sound.exit_code == 0
    assert sound.sentence == (
        "40 pages compared: all are equal except 3 given back by the guest, about which the check "
        "proves nothing"
    )
    text = check_report.to_text(sound)
    assert (
        "pages given back by the guest through balloon b (3):\n  GPA 0x8000 to 0x9fff (m0 " in text
    )
    assert ANSWERS["discarded"]["discarded"] == [
        {"gpa": 0x8000, "region": "m0", "offset": 0x8000, "pages": 2},
        {"gpa": 0xB000, "region": "m0", "offset": 0xB000, "pages": 1},
    ]
    assert check([5], [], (8,)).exit_code == check([5], [], (8,), (10,)).exit_code == 1
    assert check([], [], (8,), (10,)).exit_code == 3
    assert "pages either lost or given back by the guest through balloon b (1):" in (
        check_report.to_text(check([], [], (8,), (10,)))
    )


def test_tcg_is_blamed_only_if_a_known_rule_applies() -> None:
    new = proof([LostPage(0x9000, 0x9000, 1, Blame.ACCELERATOR)])
    assert "Under TCG" not in report.to_text(new), "the first block is sound since 9.0"
    assert "lose such pages of RAM block ram,\nbecause its size, 65536 KiB, is a" in (
        report.to_text(replace(new, qemu_version="7.2.22 Debian 1:7.2"))
    )
    classes = np.zeros(PAGES, dtype=np.uint8)
    after_first = RamMap(new.ram_map.meanings, [MapArea("dimm0-ram", 0, 0, classes)])
    text = report.to_text(replace(new, ram_map=after_first))
    assert "RAM block dimm0-ram,\nbecause its size, 131072 KiB, is a" in text
    assert "not the first RAM block" in text


@pytest.mark.parametrize(
    ("device", "reason"),
    [(Foreign(OPTIONS), "huge pages that arrive whole"), (Network(OPTIONS), "reused buffers")],
)
def test_the_text_says_why_a_lost_bit_is_not_guaranteed_detectable(
    device: EmulatedDevice, reason: str
) -> None:
    found = proof([], sensitivity_by_guest(5, guaranteed=False), device=device)
    text = report.to_text(replace(found, setup=replace(found.setup, guest="linux")))
    assert f"but in\n               {reason}: a single lost dirty bit is not guaranteed" in text
