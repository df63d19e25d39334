"""QEMU's physical map as its monitor prints it, and the common ranges of two maps."""

from __future__ import annotations

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.memory.physical_map import (
    MapRegion,
    common_ranges,
    hidden_parts,
    parse_flat_view,
    parse_hva,
    shown_parts,
)

MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): /objects/m0 KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000dffff (prio 0, rom): /objects/m0 @00000000000c0000 KVM
  0000000000100000-000000007fffffff (prio 0, ram): /objects/m0 @0000000000100000 KVM
  00000000fc000000-00000000fc000fff (prio 0, ramd): 0000:01:00.0 BAR 0 mmaps[0]
  00000000fffc0000-00000000ffffffff (prio 0, romd): system.flash0
  0000000100000000-000000013fffffff (prio 0, nv-ram): nv dimm

FlatView #2
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): /objects/m0
"""


def test_the_view_of_the_systems_memory_is_read() -> None:
    regions = parse_flat_view(MTREE.replace("\n", "\r\n"))
    assert regions == [
        MapRegion(0, 0xA0000, "ram", "/objects/m0"),
        MapRegion(0xA0000, 0x20000, "i/o", "vga-lowmem"),
        MapRegion(0xC0000, 0x20000, "rom", "/objects/m0", 0xC0000),
        MapRegion(0x100000, 0x7FF00000, "ram", "/objects/m0", 0x100000),
        MapRegion(0xFC000000, 0x1000, "ramd", "0000:01:00.0 BAR 0 mmaps[0]"),
        MapRegion(0xFFFC0000, 0x40000, "romd", "system.flash0"),
        MapRegion(0x100000000, 0x40000000, "nv-ram", "nv dimm"),
    ]
    assert [region.is_ram for region in regions] == [True, False, True, True, False, True, True]


def test_hidden_parts_of_a_backend_are_found() -> None:
    regions = parse_flat_view(MTREE)
    assert hidden_parts(regions, "m0", 0x80001000) == [
        (0xA0000, 0x20000),
        (0xE0000, 0x20000),
        (0x80000000, 0x1000),
    ]
    assert hidden_parts(regions, "m0", 0x80000000)[-1] == (0xE0000, 0x20000)
    beyond = [MapRegion(0, 0x1000, "ram", "m0", 1 << 60)]
    assert hidden_parts(beyond, "m0", 0x3000) == [(0, 0x3000)], "the size bounds damaged offsets"


def test_adjacent_parts_of_a_backend_are_merged() -> None:
    regions = [
        *parse_flat_view(MTREE)[:4],
        MapRegion(0x80000000, 0x1000, "ram", "m0", 0x80000000),
        MapRegion(0x80001000, 0x1000, "ram", "m1", 0x80001000),
        MapRegion(0x80002000, 0x1000, "ram", "m0", 0x80001000),
    ]
    assert shown_parts(regions, "m0") == [
        (0, 0, 0xA0000),
        (0xC0000, 0xC0000, 0x20000),
        (0x100000, 0x100000, 0x7FF01000),
        (0x80002000, 0x80001000, 0x1000),
    ]


@pytest.mark.parametrize("text", ["", "unknown command", MTREE.split("FlatView #1")[0]])
def test_a_text_without_a_map_is_refused(text: str) -> None:
    with pytest.raises(UntestableError, match="human monitor"):
        parse_flat_view(text)


def test_only_ram_has_a_host_address() -> None:
    assert parse_hva("Host virtual address for 0x0 (m) is 0x7f508fe00000\r\n") == 0x7F508FE00000
    assert parse_hva("Memory at address 0xfec00000 is not RAM\n") is None


def test_ranges_are_split_at_the_boundaries_of_both_maps() -> None:
    whole = [MapRegion(0, 0x3000, "ram", "a"), MapRegion(0x3000, 0x1000, "i/o", "x")]
    cut = [MapRegion(0, 0x1000, "rom", "a"), MapRegion(0x1000, 0x2000, "ram", "a", 0x1000)]
    ranges = common_ranges(whole, cut)
    assert [(each.gpa, each.length) for each in ranges] == [(0, 0x1000), (0x1000, 0x2000)]
    assert [each.destination for each in ranges] == cut
    assert {each.source for each in ranges} == {whole[0]}


def test_ram_in_only_one_map_is_refused() -> None:
    whole = [MapRegion(0, 0x3000, "ram", "a")]
    parts = [MapRegion(0, 0x1000, "ram", "a"), MapRegion(0x2000, 0x2000, "ram", "b")]
    with pytest.raises(UntestableError, match="0x1000 to 0x1fff is a on the source and not RAM"):
        common_ranges(whole, parts)
    with pytest.raises(UntestableError, match="0x1000 to 0x1fff is not RAM on the source and a"):
        common_ranges(parts, whole)


@pytest.mark.parametrize(
    "line",
    [
        "  0000000000200000-00000000003fffff (prio 0, ram) /objects/m0",
        "  0000000000200000-00000000001fffff (prio 0, ram): /objects/m0",
        "  200000-3fffff (prio 0, ram): /objects/m0",
        "  something else",
    ],
)
def test_a_line_in_an_unknown_format_is_refused(line: str) -> None:
    text = MTREE.replace(" Root memory region: system\n", f" Root memory region: system\n{line}\n")
    with pytest.raises(UntestableError, match="line in an unknown format: "):
        parse_flat_view(text)


def test_overlapping_regions_are_refused() -> None:
    text = MTREE.replace("00000000000a0000-00000000000bffff", "0000000000090000-00000000000bffff")
    with pytest.raises(UntestableError, match="vga-lowmem at 0x90000 overlaps /objects/m0"):
        parse_flat_view(text)
