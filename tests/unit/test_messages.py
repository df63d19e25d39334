"""The vhost-user messages at their limits: accepted values and their decoding."""

from __future__ import annotations

import struct

import pytest

from dmaproof.errors import ProtocolError
from dmaproof.units import PAGE_BYTES
from dmaproof.vhost_user.messages import (
    MAX_FILE_DESCRIPTORS,
    MAX_PAYLOAD_BYTES,
    Header,
    MemoryRegion,
    Message,
    Request,
    VringAddress,
    decode_header,
    decode_memory_table,
    decode_u64,
    decode_vring_address,
    encode_request,
    encode_u64,
)


def test_the_longest_payload_is_accepted() -> None:
    header = struct.pack("<III", Request.SET_FEATURES, 1, MAX_PAYLOAD_BYTES)
    assert decode_header(header) == Header(Request.SET_FEATURES, False, MAX_PAYLOAD_BYTES)
    with pytest.raises(ProtocolError, match="at most 4096 bytes, got 4097"):
        decode_header(struct.pack("<III", Request.SET_FEATURES, 1, MAX_PAYLOAD_BYTES + 1))


def test_a_request_asks_for_an_answer_only_on_demand() -> None:
    flags = [encode_request(Request.SET_OWNER, need_reply=wanted)[4:8] for wanted in (False, True)]
    assert flags == [b"\1\0\0\0", b"\x09\0\0\0"]
    assert encode_request(Request.SET_OWNER)[4:8] == flags[0]


def test_addresses_of_memory_regions_are_unsigned() -> None:
    largest = (1 << 64) - 1
    payload = struct.pack("<IIQQQQ", 1, 0, largest, largest, largest, largest)
    table = decode_memory_table(Message(Request.SET_MEM_TABLE, payload, (3,), False))
    assert table == [MemoryRegion(*[largest] * 4)]


def test_numbers_are_unsigned_64_bit() -> None:
    largest = (1 << 64) - 1
    assert encode_u64(largest) == b"\xff" * 8
    assert decode_u64(Message(Request.SET_FEATURES, b"\xff" * 8, (), False)) == largest


@pytest.mark.parametrize(("flags", "logged"), [(0, False), (1, True), (2, False), (3, True)])
def test_only_the_lowest_flag_says_that_a_ring_is_logged(flags: int, logged: bool) -> None:
    largest = (1 << 64) - 1
    payload = struct.pack("<IIQQQQ", 7, flags, 1, 2, 3, largest)
    message = Message(Request.SET_VRING_ADDR, payload, (), False)
    assert decode_vring_address(message) == VringAddress(7, logged, 1, 2, 3, largest)


def memory_table(regions: int, *, files: int | None = None, rest: bytes = b"") -> Message:
    """Return a SET_MEM_TABLE with `regions` regions of one page each, followed by `rest`."""
    payload = struct.pack("<II", regions, 0) + b"".join(
        struct.pack("<QQQQ", number * PAGE_BYTES, PAGE_BYTES, 0, 0) for number in range(regions)
    )
    fds = range(regions if files is None else files)
    return Message(Request.SET_MEM_TABLE, payload + rest, tuple(fds), False)


def test_a_memory_table_has_1_to_8_regions() -> None:
    for regions in (1, MAX_FILE_DESCRIPTORS):
        assert decode_memory_table(memory_table(regions)) == [
            MemoryRegion(number * PAGE_BYTES, PAGE_BYTES, 0, 0) for number in range(regions)
        ]
    for regions in (0, MAX_FILE_DESCRIPTORS + 1):
        with pytest.raises(ProtocolError, match=f"SET_MEM_TABLE: {regions} regions"):
            decode_memory_table(memory_table(regions))


def test_padding_and_bytes_after_the_regions_are_ignored() -> None:
    table = memory_table(2, rest=bytes(9))
    padded = table.payload[:4] + b"\xff" * 4 + table.payload[8:]
    assert len(decode_memory_table(table._replace(payload=padded))) == 2


@pytest.mark.parametrize("length", [0, 7])
def test_a_memory_table_without_its_count_is_refused(length: int) -> None:
    message = Message(Request.SET_MEM_TABLE, bytes(length), (), False)
    with pytest.raises(ProtocolError, match=f"at least 8 bytes, got {length}"):
        decode_memory_table(message)
