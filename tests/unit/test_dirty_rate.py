"""The devices' dirty rate, read from a vhost log that this process holds itself."""

from __future__ import annotations

import os

import pytest

from qmp_tools.migration.dirty_rate import DirtyRates, VhostLogMeter, to_text


def log_fd(length: int = 4096) -> int:
    fd = os.memfd_create("vhost-log")
    os.ftruncate(fd, length)
    return fd


def test_bits_are_counted_as_they_appear_and_never_cleared() -> None:
    meter = VhostLogMeter(os.getpid(), "me")
    fd = log_fd()
    try:
        os.pwrite(fd, b"\xff", 0)  # was there before: not this measurement's
        meter.read()
        assert meter.bytes_per_s is None
        os.pwrite(fd, b"\x03", 100)
        meter.read()
        os.pwrite(fd, b"\x00", 0)  # QEMU syncs
        os.pwrite(fd, b"\x07", 100)
        meter.read()
        assert meter.bytes_per_s == pytest.approx(3 * 4096 / meter.seconds)
        os.pwrite(fd, b"\x01", 0)  # dirty again after the sync: counts again
        meter.read()
        assert meter.bytes_per_s == pytest.approx(4 * 4096 / meter.seconds)
        assert os.pread(fd, 1, 0) == b"\x01"
        assert os.pread(fd, 1, 100) == b"\x07"
    finally:
        os.close(fd)


def test_the_first_read_of_a_new_log_counts_nothing() -> None:
    meter = VhostLogMeter(os.getpid(), "me")
    first = log_fd()
    meter.read()
    os.pwrite(first, b"\x01", 0)
    meter.read()
    second = log_fd()
    os.pwrite(second, b"\xff", 0)
    os.close(first)
    try:
        seconds = meter.seconds
        meter.read()
        assert meter.seconds == seconds
        os.pwrite(second, b"\x01", 8)
        meter.read()
        assert meter.bytes_per_s == pytest.approx(2 * 4096 / meter.seconds)
    finally:
        os.close(second)


def test_the_text_says_that_there_is_no_log() -> None:
    meter = VhostLogMeter(os.getpid(), "me")
    meter.read()
    assert meter.bytes_per_s is None
    rates = DirtyRates("page-sampling", 1, 5 << 20, {}, meter.bytes_per_s, meter.seconds)
    assert "not measured: QEMU has a vhost log only" in to_text(rates)
    measured = DirtyRates("dirty-ring", 1, 5 << 20, {0: 1 << 20}, 2.0 * (1 << 20), 0.9)
    assert "vCPU 0   1 MiB/s" in to_text(measured)
    assert "at least 2.0 MiB/s over 0.9 s" in to_text(measured)
