"""The C core next to inaccessible pages: a call that leaves its memory kills its process."""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import os
import random
import resource
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from dmaproof import _core
from support.core import DIRTY, HUGE, NODE, PAGE, PRESENT, amd, as_number, pairs


def guarded(pages: int) -> memoryview:
    """Map zeroed pages between two inaccessible pages; the last view unmaps them."""
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + (pages + 1) * mmap.PAGESIZE):
        failed = libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert not failed, os.strerror(ctypes.get_errno())
    return memoryview(memory)[mmap.PAGESIZE : -mmap.PAGESIZE]


def exit_of(work: Callable[[], None]) -> int:
    """Return the exit code of a child that does `work`: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_access_to_a_guard_page_kills_the_process() -> None:
    """This shows that the tests below can fail."""

    def touch() -> None:
        memory = guarded(1)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ctypes.string_at(address + len(memory), 1)

    assert exit_of(touch) < 0


def at_both_guards(memory: memoryview, size: int) -> list[memoryview]:
    """Return the first `size` bytes after the lower guard, and the last before the upper guard."""
    return [memory[:size], memory[len(memory) - size :]]


def call_with_bitmaps(size: int) -> None:
    """Call every function on bitmaps of `size` bytes between guards."""
    bits = 8 * size
    rng = random.Random(size)
    first, second = guarded(1), guarded(1)
    for into in at_both_guards(first, size):
        for source in at_both_guards(second, size):
            for shift in (0, 1, 8, 63):
                if shift >= bits:
                    continue
                count = bits - shift
                source[:] = rng.randbytes(size)
                into[:] = bytes(size)
                wanted = as_number(source) >> shift
                assert _core.or_bits(into, 0, source, shift, count, True) == wanted.bit_count()
                assert as_number(into) == wanted
                assert _core.or_bits(into, shift, source, 0, count, False) >= 0
            assert _core.or_pages(into, 0, 12, source, 0, 12, 0, bits * PAGE - 1) >= 0
        into[:] = b"\xff" * size
        assert _core.count_bits(into, 0, bits) == bits
        assert pairs(_core.find_set(into, 0, bits)) == [(0, bits)]
        assert pairs(_core.take_set(into, 0, bits)) == [(0, bits)]
        assert _core.count_bits(into, 0, bits) == 0
        assert pairs(_core.find_set(into, 0, bits)) == []
        assert _core.set_bits(into, 0, bits, True) == bits
        assert _core.set_bits(into, 0, bits, False) == 0


def call_with_ranges(count: int) -> None:
    """Set `count` ranges; their lists and the bitmap end at a guard."""
    bitmap, starts, sizes = guarded(1), guarded(1), guarded(1)
    for size, place in itertools.product((8, 16, 64, 640), (0, 1)):
        iovas = np.frombuffer(at_both_guards(starts, 8 * count)[place], dtype=np.uint64)
        lengths = np.frombuffer(at_both_guards(sizes, 8 * count)[place], dtype=np.uint64)
        data = bitmap[PAGE - size :]
        last = 8 * size - 1
        for step in (0, 1, 7, 64, 601):
            for of_each in (1, 2, lengths):
                lengths[:] = 1
                room = last - (of_each == 2 if isinstance(of_each, int) else 0)
                iovas[:] = [room - i * step % (room + 1) for i in range(count)]
                for shared in (True, False):
                    data[:] = bytes(size)
                    added = _core.set_ranges(data, 0, last, 0, iovas, of_each, shared)
                    assert added == as_number(data).bit_count() > 0


def call_with_tables(nodes: int) -> None:
    """Walk tables that end at a guard; the last node is the root."""
    memory = guarded(nodes)
    entries = np.frombuffer(memory, dtype=np.uint64).reshape(nodes, 512)
    entries[:-1] = 1
    for node in range(nodes - 1):
        entries[-1, node] = node * PAGE | 0x201
    layout = amd(levels=2, root=(nodes - 1) * PAGE)
    _core.mark_table(memory, layout, 0, 512 * HUGE - 1)
    found = pairs(_core.read_table(memory, layout, 0, 512 * HUGE - 1, True))
    assert found == ([(0, (nodes - 1) * HUGE)] if nodes > 1 else [])


def call_with_pages(page_bytes: int) -> None:
    """Compare pages that end at a guard."""
    left, right, bits = guarded(1), guarded(1), guarded(1)
    pages = PAGE // page_bytes
    left, right = left[PAGE - pages * page_bytes :], right[PAGE - pages * page_bytes :]
    differing = bits[PAGE - -(-pages // 8) :]
    left[-1] = 1
    for other in (right, None):
        differing[:] = bytes(len(differing))
        assert _core.differing_pages(left, other, page_bytes, differing) == 1
        assert as_number(differing) == 1 << pages - 1


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (call_with_bitmaps, [*range(1, 34), *range(56, 90), 127, 128, 129, 200]),
        (call_with_ranges, [1, 7, 8, 9, 31, 32, 33, 34, 64, 65]),
        (call_with_tables, [1, 2, 3]),
        (call_with_pages, [1, 7, 8, 64, 255, 256, 257, 512, 1000, 4096]),
    ],
)
def test_no_call_accesses_bytes_before_or_after_its_memory(
    call: Callable[[int], None], sizes: list[int]
) -> None:
    def work() -> None:
        for size in sizes:
            call(size)

    assert exit_of(work) == 0


SPARE_BYTES = 16 << 20
WITHOUT_LIMIT = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer's memory has no such limit"
)


def limit_memory() -> None:
    """Limit this process to `SPARE_BYTES` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + SPARE_BYTES,) * 2)


def use_up_memory() -> list[bytearray]:
    """Use up memory until not even 64 KiB are left; dropping the result frees the memory."""
    limit_memory()
    used: list[bytearray] = []
    for size in (1 << 20, 1 << 16):  # memory freed earlier lies in pieces of many sizes
        with suppress(MemoryError):
            while True:
                used.append(bytearray(size))
    return used


def call_for_runs(name: str) -> Callable[[], object]:
    """Return a call that needs a mebibyte for the runs of set bits that it finds."""
    nodes = 256
    table = np.zeros((1 + nodes, 512), dtype=np.uint64)
    table[0, :nodes] = np.arange(1, 1 + nodes) * PAGE | NODE | PRESENT
    table[1:, ::2] = DIRTY | PRESENT
    bits = b"\x55" * (nodes * 512 // 8)  # the same number of runs as the table has
    into, last = bytearray(len(bits)), nodes * HUGE - 1
    calls: dict[str, Callable[[], object]] = {
        "find_set": lambda: _core.find_set(bits, 0, 8 * len(bits)),
        "or_pages": lambda: _core.or_pages(into, 0, 12, bits, 0, 12, 0, last),
        "read_table": lambda: _core.read_table(table, amd(levels=2), 0, last, False),
    }
    return calls[name]


@WITHOUT_LIMIT
@pytest.mark.parametrize("name", ["find_set", "or_pages", "read_table"])
def test_runs_that_do_not_fit_in_memory_are_an_error(name: str) -> None:
    """A result without these runs would report dirty pages as clean."""
    call = call_for_runs(name)

    def work() -> None:
        call()
        used = use_up_memory()
        with pytest.raises(MemoryError):
            call()
        del used

    assert exit_of(work) == 0


@WITHOUT_LIMIT
@pytest.mark.parametrize("name", ["find_set", "or_pages", "read_table"])
def test_memory_for_runs_is_freed(name: str) -> None:
    call = call_for_runs(name)

    def work() -> None:
        limit_memory()
        for _ in range(2 * SPARE_BYTES >> 20):
            call()

    assert exit_of(work) == 0
