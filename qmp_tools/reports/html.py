"""A report's JSON as one HTML page that needs nothing else: no network, no script, no font.

Light and dark follow the reader's setting, and the page fits a phone. All numbers come from the
JSON; what the JSON does not have, the page does not show.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from ..processes.machine import MIB
from .html_charts import CLASS_STYLES, cell_pages, ram_area, timeline
from .report import HEADINGS

_STYLES: Final = {0: "pass", 1: "fail", 3: "untested"}
_ROWS_SHOWN: Final = 500
_ROWS_OPEN: Final = 20
_PASSES_OPEN: Final = 12
_PART_STYLES: Final = ("plain", "strong", "soft", "known", "good")

Json = Mapping[str, Any]


def to_html(answer: Json) -> str:
    """The page for a proof, a check, or one of these that could not be carried out."""
    sections = {"prove": _proof_sections, "check": _check_sections}.get(answer["kind"])
    style = Path(__file__).with_suffix(".css").read_text()
    code = answer["exit_code"]
    heading = HEADINGS[code]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>dmaproof: {escape(heading)}</title>\n<style>\n{style}</style>\n</head>\n"
        f'<body class="{_STYLES[code]}">\n<main>\n<header>\n<span class="badge">{heading}</span>\n'
        f"<h1>{escape(_sentence(answer['verdict']))}</h1>\n{_subtitle(answer)}</header>\n"
        + "\n".join(sections(answer) if sections else [])
        + "\n</main>\n</body>\n</html>\n"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


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


def _section(title: str, *content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def _facts(rows: Sequence[tuple[str, Any]]) -> str:
    return (
        '<dl class="facts">'
        + "".join(
            f"<div><dt>{escape(name)}</dt>"
            f"<dd{'' if isinstance(value, int) else _WORDS}>{_number(value)}</dd></div>"
            for name, value in rows
        )
        + "</dl>"
    )


_WORDS: Final = ' class="words"'


def _number(value: Any) -> str:
    """Whole numbers with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u2009") if isinstance(value, int) else escape(str(value))


def _table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """`columns` are (heading, whether it holds words); the cells of `rows` are HTML."""
    styles = [_WORDS if words else "" for _, words in columns]
    head = "".join(
        f"<th{style}>{escape(name)}</th>" for (name, _), style in zip(columns, styles, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{style}>{cell}</td>" for cell, style in zip(row, styles, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _proof_sections(answer: Json) -> list[str]:
    migration = answer["migration"]
    found = [_section("What the verdict rests on", _proof_facts(answer), _control(answer))]
    found += [
        _ram(answer["ram_map"]),
        _section(
            "The precopy",
            f'<div class="wide">{timeline(migration)}</div>',
            _harvest_legend(answer),
            _passes(migration["passes"]),
        ),
        _section("The downtime", _downtime(migration)),
    ]
    if answer["lost_pages"]:
        found.append(_lost_pages(answer["lost_pages"]))
    found.append(_section("To do it again", _commands(answer["commands"])))
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
        *_device(setup),
        ("migration", f"{setup['way']}, {answer['migration']['migration_s']:.1f} s"),
    ]
    if setup["fault"]:
        rows.append(("planted fault", setup["fault"]))
    return _facts(rows)


def _written(sharpness: Json) -> list[tuple[str, Any]]:
    if sharpness["witness"] == "guest":
        return [("written after all had been sent, certain to show a loss", sharpness["certain"])]
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


def _device(setup: Json) -> list[tuple[str, Any]]:
    if setup["tracker"] is None:
        return [("device", f"{setup['device']}, without a journal")]
    harvest = setup["harvest"]
    return [
        ("device, tracker", f"{setup['device']}, {setup['tracker']}"),
        ("harvest", f"{harvest} s" if harvest[0].isdigit() else harvest),
    ]


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
    return _section("Lost pages", *_long_table(columns, pages, len(pages), _lost_page))


def _lost_page(page: Json) -> list[str]:
    seen = page["last_seen_in_harvest"].items()
    return [
        f"<code>{_address(page['gpa'])}</code>",
        escape(page["blame"]),
        _known(page["link"]),
        _known(page["kind"]),
        _known(page["request"]),
        _known(page["queue"]),
        _known(None if page["seconds"] is None else f"{page['seconds']:.3f}"),
        _known(page["due_in_harvest"]),
        ", ".join(f"{escape(link)}\u00a0{epoch or 'never'}" for link, epoch in seen) or "–",
    ]


def _known(value: Any) -> str:
    return "–" if value is None else escape(str(value))


def _long(text: str) -> str:
    return f'<span class="long">{escape(text)}</span>'


def _long_table(
    columns: Sequence[tuple[str, bool]],
    items: Sequence[Json],
    total: int,
    row: Callable[[Json], list[str]],
) -> list[str]:
    """A table whose first rows are open to see; `total` of which the JSON may have only some."""
    rows = [row(item) for item in items[:_ROWS_SHOWN]]
    parts = [_table(columns, rows[:_ROWS_OPEN])]
    if rows[_ROWS_OPEN:]:
        summary = f"<summary>{len(rows) - _ROWS_OPEN} more</summary>"
        parts.append(f"<details>{summary}{_table(columns, rows[_ROWS_OPEN:])}</details>")
    if total > len(rows):
        parts.append(f'<p class="quiet">{total - len(rows)} more are not shown here.</p>')
    return parts


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
    return _legend(rows)


def _legend(rows: Sequence[tuple[str, int, str]]) -> str:
    return (
        '<ul class="legend">'
        + "".join(
            f'<li><i class="{style}"></i><b>{_number(count)}</b><span>{escape(text)}</span></li>'
            for style, count, text in rows
        )
        + "</ul>"
    )


def _passes(passes: Sequence[Json]) -> str:
    rows = [
        (
            str(it["sync"]),
            f"{it['began_s']:.2f}",
            f"{it['ended_s'] - it['began_s']:.2f}",
            _number(it["harvests"]),
            _number(it["harvested_pages"]),
            _number(it["merged_pages"]),
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
        + _table([(name, False) for name in names], rows)
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


def _ram(ram_map: Json) -> str:
    pages_a_cell = cell_pages(ram_map)
    legend = _legend(
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
    return _section("The guest’s RAM", legend, note, *drawings)


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
        ("comparing took", f"{answer['compare_s']:.1f} s"),
    ]
    for name in ("source", "destination"):
        side = answer[name]
        in_place, saved = side["in_place_bytes"] // MIB, side["saved_bytes"] // MIB
        rows += [
            (f"{name}", f"process {side['pid']}, {side['status']}"),
            (f"{name}'s memory, read", f"{in_place} MiB in place, {saved} MiB saved by QEMU"),
        ]
    found = [_section("What was compared", _facts(rows), *(_note(it) for it in answer["notes"]))]
    if differences:
        columns = [("GPA", True), ("region", True), ("bytes", False)]
        columns += [("DIMM", True), ("known as", True)]
        table = _long_table(columns, differences, answer["pages_differing"], _difference)
        known = {it["known"]: it["why"] for it in differences if it["known"]}
        table += [_note(f"{name}: {why}.") for name, why in known.items()]
        found.append(_section("Pages that differ", *table))
    found.append(_ram(answer["ram_map"]))
    if answer["not_compared"]:
        items = [
            (
                f"<code>{escape(it['region'])} +{it['offset']:#x}</code>",
                f"{it['length'] // 1024} KiB",
                _long(it["why"]),
            )
            for it in answer["not_compared"]
        ]
        columns = [("region", True), ("length", False), ("why", True)]
        found.append(_section("Not compared", _table(columns, items)))
    return found


def _difference(page: Json) -> list[str]:
    return [
        f"<code>{_address(page['gpa'])}</code>",
        f"<code>{escape(page['region'])} +{page['offset']:#x}</code>",
        str(page["bytes_differing"]),
        escape(page["device"] or "–"),
        escape(page["known"] or "–"),
    ]


def _note(text: str) -> str:
    return f'<p class="quiet" style="margin-top:14px">{escape(_sentence(text))}</p>'
