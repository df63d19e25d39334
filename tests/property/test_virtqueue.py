"""Any traffic on any ring: each submitted request arrives exactly once and returns exactly once.

The ring may begin anywhere in a page, and its pages may be scattered over guest RAM.

The test bed's driver shares no code with the device. The device answers in any order. It is
replaced in the middle of the traffic, as by a migration, and then continues from its base alone.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dmaproof.journal import Journal, WriteKind
from dmaproof.virtqueue import DescriptorChain, Segment
from qmp_tools.testbed.ring_driver import PAGE, WRITE, Buffer
from support.rings import DATA, DRIVERS, RING, TABLES, Marks, dma_for, driver_of, queue_for, scatter


@given(
    form=st.sampled_from(sorted(DRIVERS)),
    size=st.sampled_from([1, 2, 4, 8, 32]),
    event_index=st.booleans(),
    start=st.integers(0, PAGE // 16 - 1),
    scattered=st.booleans(),
    data=st.data(),
)
def test_each_request_arrives_once_and_is_returned_once(
    form: str, size: int, event_index: bool, start: int, scattered: bool, data: st.DataObject
) -> None:
    with driver_of(DRIVERS[form], size, base=RING + 16 * start) as driver:
        if scattered:
            scatter(driver)
        driver.event_index = event_index
        driver.interrupt(wanted=True, after=1)
        marks, journal = Marks(), Journal()
        journal.start()
        dma = dma_for(driver.memory, bus=driver.bus, marks=marks, journal=journal)
        queue = queue_for(driver, dma)
        room = size
        requests = 0
        submitted: list[tuple[int, list[Segment], list[Segment]]] = []
        taken: list[DescriptorChain] = []
        in_flight: dict[int, int] = {}  # number → descriptors of the ring
        returned: list[tuple[int, int]] = []
        returned_since_event = 0  # progress since the driver asked for interrupts
        event: int | None = 1
        # A packed ring's event is a descriptor and one of two rounds; a split ring's has 16 bits.
        period = 2 * size if form == "packed" else 1 << 16

        for _ in range(data.draw(st.integers(1, 60))):
            step = data.draw(
                st.sampled_from(["submit", "pop", "push", "collect", "event", "restart"])
            )
            if step == "submit" and room:
                indirect = data.draw(st.booleans())
                pieces = data.draw(st.integers(1, 40 if indirect else room))
                readable = data.draw(st.integers(0, pieces))
                segments = [Segment(DATA + 8 * i, i + 1) for i in range(pieces)]
                buffers = [
                    Buffer(*segment, 0 if number < readable else WRITE)
                    for number, segment in enumerate(segments)
                ]
                table = TABLES + PAGE * (requests % 32) if indirect else None
                requests += 1
                number = driver.submit(buffers, table)
                submitted.append((number, segments[:readable], segments[readable:]))
                in_flight[number] = 1 if indirect else pieces
                room -= in_flight[number]
            elif step == "pop":
                chain = queue.pop()
                if not submitted:
                    assert chain is None
                    assert not queue.ask_for_kick()
                else:
                    assert chain is not None
                    assert (chain.head, chain.readable, chain.writable) == submitted.pop(0)
                    assert queue.ask_for_kick() is bool(submitted)
                    taken.append(chain)
            elif step == "push" and taken:
                chain = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
                written = data.draw(st.integers(0, 1 << 31)) if chain.writable else 0
                queue.push(chain, written)
                returned.append((chain.head, written))
                before = returned_since_event
                returned_since_event += in_flight[chain.head] if form == "packed" else 1
                interrupts = queue.wants_interrupt()
                if event is None:
                    assert not interrupts
                elif event_index:
                    # An event that is not renewed matches again in each later period.
                    passed = [(count - event) // period for count in (before, returned_since_event)]
                    assert interrupts is (passed[0] < passed[1])
                else:
                    assert interrupts
            elif step == "collect":
                assert driver.collect() == returned
                room += sum(in_flight.pop(number) for number, _ in returned)
                returned = []
            elif step == "event" and not returned:
                after = data.draw(st.integers(1, size))
                wanted = data.draw(st.booleans())
                driver.interrupt(wanted=wanted, after=after)
                event = after if wanted else None
                returned_since_event = 0
            elif step == "restart":
                queue = queue_for(driver, dma, base=queue.base)

        expected = [
            (WriteKind.USED_RING, *piece)
            for range_ in marks.ranges
            for piece in driver.bus.translate(*range_)
        ]
        records = journal.records()
        assert records[["kind", "gpa", "length"]].tolist() == expected
