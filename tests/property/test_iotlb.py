"""An IOTLB against a plain table of pages, while random mappings are added and removed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmaproof.errors import IotlbMissError, MemoryAccessError
from dmaproof.guest_memory import READ, WRITE
from dmaproof.iotlb import Entry, Iotlb
from dmaproof.units import PAGE_BYTES as PAGE

PAGES = 24
BASE = (256 << 20) - 12 * PAGE
"""The first IOVA. The first pages lie in one piece of the address space, the others in the next."""

pages = st.integers(0, PAGES - 1)
lengths = st.integers(1, 8)
accesses = st.sampled_from((READ, WRITE, READ | WRITE))
changes = st.lists(
    st.one_of(
        st.tuples(st.just("update"), pages, lengths, st.integers(0, 1000), accesses),
        st.tuples(st.just("invalidate"), pages, lengths, st.just(0), st.just(0)),
    ),
    max_size=30,
)

Model = dict[int, tuple[int, int]]
"""The IOVA of each page → its GPA and its access."""


def applied(story: list[tuple[str, int, int, int, int]]) -> Iterator[tuple[Iotlb, Model]]:
    """Yield the IOTLB and its model after each change."""
    iotlb, entries = Iotlb(), dict[int, Entry]()
    for kind, page, length, gpa_page, access in story:
        iova, size = BASE + page * PAGE, length * PAGE
        gone = [
            entry for entry in entries.values() if entry.iova < iova + size and iova < entry.end
        ]
        assert _pages(iotlb.overlapping(iova, size)) == _pages(gone)
        iotlb.remove(iova, size)
        for entry in gone:
            del entries[entry.iova]
        if kind == "update":
            entry = Entry(iova, gpa_page * PAGE, size, access)
            assert iotlb.has_room_for(entry)
            iotlb.add(entry)
            assert iotlb.holds(entry)
            entries[iova] = entry
        yield (
            iotlb,
            {
                entry.iova + offset: (entry.gpa + offset, entry.access)
                for entry in entries.values()
                for offset in range(0, entry.length, PAGE)
            },
        )


def _pages(mappings: object) -> dict[int, int]:
    return {
        mapping.iova + offset: mapping.gpa + offset
        for mapping in mappings  # type: ignore[attr-defined]
        for offset in range(0, mapping.length, PAGE)
    }


@given(changes, st.integers(0, PAGES * PAGE), st.integers(1, 5 * PAGE), accesses)
def test_the_iotlb_translates_like_its_model(
    story: list[tuple[str, int, int, int, int]], offset: int, length: int, access: int
) -> None:
    start, end = BASE + offset, BASE + offset + length
    for iotlb, model in applied(story):
        assert _pages(iotlb.mappings) == {iova: gpa for iova, (gpa, _) in model.items()}
        for mapping in iotlb.mappings:
            assert any(
                first <= mapping.iova and mapping.iova + mapping.length <= first + size
                for first, size in iotlb.ranges
            )
        touched = range(start // PAGE * PAGE, end, PAGE)
        missing = [page for page in touched if page not in model or access & ~model[page][1]]
        wanted = [(start, length)]
        readable, writable = (wanted, []) if access == READ else ([], wanted)
        if missing:
            with pytest.raises(IotlbMissError) as caught:
                iotlb.translate(start, length, access)
            assert list(caught.value.missing) == [(missing[0], access)]
        else:
            position = start
            for gpa, size in iotlb.translate(start, length, access):
                assert model[position // PAGE * PAGE][0] + position % PAGE == gpa
                position += size
            assert position == end
        if access == READ | WRITE:
            continue
        if missing:
            with pytest.raises(IotlbMissError) as caught:
                iotlb.require(readable, writable)
            assert list(caught.value.missing) == [(page, access) for page in missing]
        else:
            iotlb.require(readable, writable)


def test_impossible_mappings_are_refused() -> None:
    iotlb = Iotlb()
    for entry in (
        Entry(0, 0, 0, READ),
        Entry(1, 0, PAGE, READ),
        Entry(0, 8, PAGE, READ),
        Entry(0, 0, PAGE + 512, READ),
        Entry((1 << 48) - PAGE, 0, 2 * PAGE, READ),
        Entry(0, 0, 1 << 40, READ),
    ):
        with pytest.raises(MemoryAccessError, match="IOTLB entry"):
            iotlb.add(entry)
    assert not iotlb.mappings


def test_the_iotlb_holds_a_bounded_number_of_ranges() -> None:
    def entry(number: int) -> Entry:
        return Entry(number << 30, 0, PAGE, READ)

    iotlb = Iotlb()
    for number in range(8):
        assert iotlb.has_room_for(entry(number))
        assert iotlb.add(entry(number)), "the ranges did not grow"
    assert not iotlb.has_room_for(entry(8)), "more ranges than every tracker can watch"
    assert iotlb.has_room_for(Entry(PAGE, 0, PAGE, READ))
    assert not iotlb.add(Entry(PAGE, 0, PAGE, READ))
    iotlb.clear()
    assert not iotlb.mappings
    assert not iotlb.ranges
    small = Iotlb(most_entries=2)
    small.add(Entry(0, 0, PAGE, READ))
    small.add(Entry(PAGE, 0, PAGE, READ))
    assert not small.has_room_for(Entry(2 * PAGE, 0, PAGE, READ))
    with pytest.raises(MemoryAccessError, match="touches 3 pages, but the IOTLB holds only 2"):
        small.require([(0, 2 * PAGE)], [(5 * PAGE, 1)])


def test_an_entry_may_have_the_largest_size_and_end_at_the_last_address() -> None:
    most = 64 * (256 << 20)
    for entry in (Entry(0, 0, most, READ), Entry((1 << 48) - most, 0, most, READ)):
        iotlb = Iotlb()
        assert iotlb.has_room_for(entry)
        iotlb.add(entry)
        assert iotlb.ranges == [(entry.iova, most)]
        assert iotlb.translate(entry.iova + most - 8, 8) == [(most - 8, 8)]
        assert not iotlb.has_room_for(Entry(1 << 40, 0, PAGE, READ))
        with pytest.raises(MemoryAccessError, match="IOTLB entry"):
            Iotlb().add(entry._replace(length=most + PAGE))


def test_a_request_may_touch_as_many_pages_as_the_iotlb_holds() -> None:
    iotlb = Iotlb(most_entries=3)
    for readable in ([(0, 3 * PAGE)], [(PAGE - 1, PAGE + 2)], [(0, 1), (PAGE, 1), (2 * PAGE, 1)]):
        with pytest.raises(IotlbMissError) as caught:
            iotlb.require(readable, [])
        assert list(caught.value.missing) == [(page * PAGE, READ) for page in range(3)]
    with pytest.raises(MemoryAccessError, match="touches 4 pages"):
        iotlb.require([(PAGE - 1, 2 * PAGE + 2)], [])


def test_at_most_64_pages_are_requested_at_a_time_each_with_all_its_accesses() -> None:
    iotlb = Iotlb()
    with pytest.raises(IotlbMissError) as caught:
        iotlb.require([(0, 100 * PAGE)], [])
    assert list(caught.value.missing) == [(page * PAGE, READ) for page in range(64)]
    with pytest.raises(IotlbMissError) as caught:
        iotlb.require([(0, 2 * PAGE)], [(PAGE, 2 * PAGE)])
    assert list(caught.value.missing) == [
        (0, READ),
        (PAGE, READ | WRITE),
        (2 * PAGE, WRITE),
    ]


def test_only_entries_adjacent_in_both_address_spaces_are_merged() -> None:
    def mappings(*entries: Entry) -> list[tuple[int, int, int]]:
        iotlb = Iotlb()
        for entry in entries:
            iotlb.add(entry)
        return [(mapping.iova, mapping.gpa, mapping.length) for mapping in iotlb.mappings]

    first = Entry(4 * PAGE, 8 * PAGE, PAGE, READ)
    assert mappings(first, Entry(5 * PAGE, 9 * PAGE, PAGE, WRITE)) == [
        (4 * PAGE, 8 * PAGE, 2 * PAGE)
    ]
    for iova, gpa in ((5, 7), (5, 8), (5, 10), (6, 9), (7, 9)):
        second = Entry(iova * PAGE, gpa * PAGE, PAGE, READ)
        assert mappings(first, second) == [first[:3], second[:3]]
