"""A report's JSON as one HTML page that needs nothing else: no network, no script, no font.

Light and dark follow the reader's setting, and the page fits a phone. All numbers come from the
JSON; what the JSON does not have, the page does not show.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from ..qemu.machine import MIB
from . import html_elements as element
from . import html_matrix
from .html_charts import CLASS_STYLES, cell_pages, ram_area, timeline
from .html_elements import Json
from .report import HEADINGS

_STYLES: Final = {0: "pass", 1: "fail", 3: "untested"}
_PASSES_OPEN: Final = 12
_PART_STYLES: Final = ("plain", "strong", "soft", "known", "good")


def to_html(answer: Json) -> str:
    """The page for a proof, a check, a matrix, or one of these that could not be carried out."""
    sections = {
        "prove": _proof_sections,
        "check": _check_sections,
        "matrix": html_matrix.sections,
    }.get(answer["kind"])
    style = Path(__file__).with_suffix(".css").read_text()
    code = answer["exit_code"]
    heading = HEADINGS[code]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>dmaproof: {escape(heading)}</title>\n<style>\n{style}</style>\n</head>\n"
        f'<body class="{_STYLES[code]}">\n<main>\n<header>\n<span class="badge">{heading}</span>\n'
        f"<h1>{escape(element.sentence(answer['verdict']))}</h1>\n{_subtitle(answer)}</header>\n"
        + "\n".join(sections(answer) if sections else [])
        + "\n</main>\n</body>\n</html>\n"
    )


def _subtitle(answer: Json) -> str:
    setup = answer.get("setup")
    if setup:
        text = (
            f"QEMU {setup['qemu_version']} → {setup['qemu_destination_version']}, "
            f"{setup['machine']}, {setup['accelerator']}, {setup['memory']} of RAM, "
            f"seed {setup['seed']}"
        )
    elif "source" in answer:
        text = f"QEMU {answer['source']['version']} → {answer['destination']['version']}"
    else:
        return ""
    return f'<p class="quiet">{escape(text)}</p>\n'


def _proof_sections(answer: Json) -> list[str]:
    migration = answer["migration"]
    found = [element.section("What the verdict rests on", _proof_facts(answer), _control(answer))]
    found += [
        _ram(answer["ram_map"]),
        element.section(
            "The precopy",
            f'<div class="wide">{timeline(migration)}</div>',
            _harvest_legend(answer),
            _passes(migration["passes"]),
        ),
        element.section("The downtime", _limit(answer["downtime"]), _downtime(migration)),
    ]
    if answer["wrong_rings"]:
        stories = (element.note(f"{ring['story']}.") for ring in answer["wrong_rings"])
        found.insert(1, element.section("Rings whose index is wrong", *stories))
    if refusal := answer["refusal"]:
        found.insert(
            1, element.section("What the destination refused", f"<pre>{escape(refusal)}</pre>")
        )
    if answer["lost_pages"]:
        found.append(_lost_pages(answer["lost_pages"]))
    found.append(element.section("To do it again", _commands(answer["commands"])))
    return found


def _proof_facts(answer: Json) -> str:
    sharpness, guest, setup = answer["sharpness"], answer["guest"], answer["setup"]
    rows: list[tuple[str, Any]] = [
        ("pages compared", answer["pages"]),
        ("pages lost", len(answer["lost_pages"])),
        *_written(sharpness),
        ("requests after the migration", guest["requests"]),
        ("pages the guest checked again", guest["swept"]),
        ("errors that the guest found", guest["errors"]),
        *_watched(answer),
        *_device(setup),
        ("migration", f"{setup['way']}, {answer['migration']['migration_s']:.1f} s"),
    ]
    if setup["fault"]:
        rows.append(("planted fault", setup["fault"]))
    return element.facts(rows)


def _written(sharpness: Json) -> list[tuple[str, Any]]:
    if sharpness["witness"] == "guest":
        return [
            ("written after all had been sent, as the guest knows", sharpness["rewritten"]),
            ("certain to show a lost bit", sharpness["certain"]),
        ]
    if sharpness["witness"] == "still":
        return [
            ("written before the guest stood still, certain to show a loss", sharpness["certain"])
        ]
    if sharpness["witness"] == "snapshot":
        return [("written while the snapshot was taken", sharpness["certain"])]
    links = ", ".join(f"{count} at the {link}" for link, count in sharpness["missed_at"].items())
    return [
        ("written by the device while logging", sharpness["written"]),
        ("of these after all had been sent", sharpness["rewritten"]),
        ("certain to show a lost bit", sharpness["certain"]),
        (
            "written, and never reported",
            f"{sharpness['unreported']}" + (f" ({links})" if links else ""),
        ),
    ]


def _watched(answer: Json) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    if answer["settled_s"] is not None:
        rows.append(
            ("source's RAM watched after the guest was paused", f"{answer['settled_s']:.1f} s")
        )
    if (log := answer["log"]) is not None:
        unlogged = ", ".join(f"queue {queue}" for queue in log["unlogged_queues"])
        rows += [
            ("looks at QEMU's vhost log", log["looks"]),
            ("dirty bits set after QEMU had read it last", len(log["late_bits"])),
            ("used rings that were never logged", unlogged or "none was seen"),
        ]
    if answer["unseen"]:
        rows.append(("what could not have shown", "; ".join(answer["unseen"])))
    return rows


def _device(setup: Json) -> list[tuple[str, Any]]:
    if setup["tracker"] is None:
        return [("device", f"{setup['device']}, without a journal")]
    rows = [("device, tracker", f"{setup['device']}, {setup['tracker']}")]
    if harvest := setup["harvest"]:
        rows.append(("harvest", f"{harvest} s" if harvest[0].isdigit() else harvest))
    return rows


def _control(answer: Json) -> str:
    control = answer.get("control")
    if control is None:
        return ""
    outcome = (
        f"it was caught: {len(control['lost_pages'])} pages"
        if control["caught"]
        else "it was NOT caught, so the pass means nothing"
    )
    return (
        f'<p class="quiet" style="margin-top:14px">Control: {escape(control["setup"]["fault"])} '
        f"planted in the same set-up; {outcome}.</p>"
    )


def _lost_pages(pages: Sequence[Json]) -> str:
    columns = [("GPA", True), ("lost by", True), ("at", True), ("wrote", True)]
    columns += [(name, False) for name in ("request", "queue", "after s", "due in harvest")]
    columns.append(("last seen in harvest", True))
    return element.section(
        "Lost pages", *element.long_table(columns, pages, len(pages), _lost_page)
    )


def _lost_page(page: Json) -> list[str]:
    seen = page["last_seen_in_harvest"].items()
    return [
        f"<code>{_address(page['gpa'])}</code>",
        escape(page["blame"]),
        element.known(page["link"]),
        element.known(page["kind"]),
        element.known(page["request"]),
        element.known(page["queue"]),
        element.known(None if page["seconds"] is None else f"{page['seconds']:.3f}"),
        element.known(page["due_in_harvest"]),
        ", ".join(f"{escape(link)}\u00a0{epoch or 'never'}" for link, epoch in seen) or "–",
    ]


def _address(gpa: int | None) -> str:
    return "–" if gpa is None else f"{gpa:#x}"


def _harvest_legend(answer: Json) -> str:
    if answer["setup"]["tracker"] is None:
        return ""
    harvests = answer["migration"]["harvests"]
    found = sum(it["pages"] for it in harvests)
    merged = sum(it["merged_pages"] for it in harvests)
    tracker = escape(answer["setup"]["tracker"])
    rows = [("strong", merged, f"pages of tracker {tracker} merged into QEMU's log")]
    if found != merged:
        rows.append(("bad", found - merged, "pages harvested, but not merged"))
    return element.legend(rows)


def _passes(passes: Sequence[Json]) -> str:
    rows = [
        (
            str(it["sync"]),
            f"{it['began_s']:.2f}",
            f"{it['ended_s'] - it['began_s']:.2f}",
            element.number(it["harvests"]),
            element.number(it["harvested_pages"]),
            element.number(it["merged_pages"]),
            f"{it['sent_bytes'] / MIB:.1f}",
            "–" if it["remaining_bytes"] is None else f"{it['remaining_bytes'] / MIB:.1f}",
        )
        for it in passes
    ]
    names = ("sync", "at s", "for s", "harvests", "harvested", "merged", "sent MiB", "left MiB")
    is_open = " open" if len(passes) <= _PASSES_OPEN else ""
    return (
        f"<details{is_open}><summary>{len(passes)} passes, each from one bitmap sync to the next; "
        "harvested and merged in pages</summary>"
        + element.table([(name, False) for name in names], rows)
        + "</details>"
    )


def _downtime(migration: Json) -> str:
    parts = migration["downtime_parts"]
    total = migration["downtime_s"]
    head = (
        "<p>QEMU does not tell its downtime.</p>"
        if total is None
        else f"<p>{total * 1000:.0f} ms by QEMU's own count.</p>"
    )
    if not parts:
        return head + '<p class="quiet">This QEMU’s events do not tell what it went to.</p>'
    styles = [_PART_STYLES[number % len(_PART_STYLES)] for number in range(len(parts))]
    bar = "".join(
        f'<i class="{style}" style="flex:{max(part["seconds"], 0) * 1e6:.0f} 0 0"></i>'
        for part, style in zip(parts, styles, strict=True)
    )
    rows = "".join(
        f'<li><i class="{style}"></i><b>{part["seconds"] * 1000:.1f} ms</b>'
        f"<span>{escape(part['what'])}</span></li>"
        for part, style in zip(parts, styles, strict=True)
    )
    return f'{head}<div class="parts">{bar}</div><ul class="legend">{rows}</ul>'


def _limit(downtime: Json) -> str:
    if downtime["limit_s"] is None:
        return ""
    if downtime["seconds"] is None:
        return "<p>It could not be measured, so it cannot be held against its limit.</p>"
    relation = "more than" if downtime["exceeded"] else "within"
    rows = [
        (f"{part['seconds'] * 1000:.1f} ms", escape(part["what"])) for part in downtime["parts"]
    ]
    return (
        f"<p>{downtime['seconds'] * 1000:.0f} ms until the destination had loaded everything: "
        f"{relation} the {downtime['limit_s'] * 1000:.0f} ms that are allowed.</p>"
        + element.table([("for", False), ("part", True)], rows)
    )


def _ram(ram_map: Json) -> str:
    pages_a_cell = cell_pages(ram_map)
    legend = element.legend(
        [
            (CLASS_STYLES[kind["name"]], kind["pages"], f"{kind['name']}: {kind['meaning']}")
            for kind in ram_map["classes"]
        ]
    )
    amount = f"{pages_a_cell} pages ({pages_a_cell * ram_map['page_bytes'] // 1024} KiB)"
    drawings = [
        f"<h3>{_area_title(area, ram_map['page_bytes'])}</h3>"
        + ram_area(area, ram_map, pages_a_cell)
        for area in ram_map["areas"]
    ]
    note = f'<p class="quiet">A cell is {amount} and has the colour of the gravest page in it.</p>'
    return element.section("The guest’s RAM", legend, note, *drawings)


def _area_title(area: Json, page_bytes: int) -> str:
    length = area["pages"] * page_bytes
    size = f"{length / MIB:.0f} MiB" if length >= MIB else f"{length // 1024} KiB"
    if area["gpa"] is None:
        place = f"hidden by the physical map, from +{area['offset']:#x}"
    else:
        place = f"<code>{area['gpa']:#x} – {area['gpa'] + length - 1:#x}</code>"
    return f"{place} · {escape(area['region'])} · {size}"


def _commands(commands: Mapping[str, Sequence[str]]) -> str:
    return "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(shlex.join(command))}</pre>"
        for name, command in commands.items()
    )


def _check_sections(answer: Json) -> list[str]:
    differences = answer["differences"]
    rows: list[tuple[str, Any]] = [
        ("pages compared", answer["pages"]),
        ("pages that differ", answer["pages_differing"]),
        ("of these known to differ", answer["pages_known_to_differ"]),
        ("given back by the guest", answer["pages_discarded"]),
        ("lost or given back, not decided", answer["pages_undecided"]),
        ("devices that discard", ", ".join(answer["discarding_devices"]) or "–"),
        ("comparing took", f"{answer['compare_s']:.1f} s"),
    ]
    for name in ("source", "destination"):
        side = answer[name]
        in_place, copied, saved = (
            side[f"{how}_bytes"] // MIB for how in ("in_place", "copied", "saved")
        )
        rows += [
            (f"{name}", f"process {side['pid']}, {side['status']}"),
            (
                f"{name}'s memory, read",
                f"{in_place} MiB in place, {copied} MiB copied from its process, "
                f"{saved} MiB saved by QEMU",
            ),
        ]
    found = [
        element.section(
            "What was compared", element.facts(rows), *(element.note(it) for it in answer["notes"])
        )
    ]
    if differences:
        columns = [("GPA", True), ("region", True), ("bytes", False)]
        columns += [("DIMM", True), ("known as", True)]
        table = element.long_table(columns, differences, answer["pages_differing"], _difference)
        known = {it["known"]: it["why"] for it in differences if it["known"]}
        table += [element.note(f"{name}: {why}.") for name, why in known.items()]
        found.append(element.section("Pages that differ", *table))
    found.append(_ram(answer["ram_map"]))
    if answer["not_compared"]:
        items = [
            (
                f"<code>{escape(it['region'])} +{it['offset']:#x}</code>",
                f"{it['length'] // 1024} KiB",
                element.long_text(it["why"]),
            )
            for it in answer["not_compared"]
        ]
        columns = [("region", True), ("length", False), ("why", True)]
        found.append(element.section("Not compared", element.table(columns, items)))
    return found


def _difference(page: Json) -> list[str]:
    return [
        f"<code>{_address(page['gpa'])}</code>",
        f"<code>{escape(page['region'])} +{page['offset']:#x}</code>",
        str(page["bytes_differing"]),
        escape(page["device"] or "–"),
        escape(page["known"] or "–"),
    ]
