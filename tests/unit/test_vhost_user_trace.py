"""The vhost-user messages that a QEMU has sent, found in its trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmp_tools.qemu.vhost_user_trace import logs_installed, page_faults, unanswered

GET_FEATURES = "vhost_user_write req:1 flags:0x1\nvhost_user_read req:1 flags:0x5\n"


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (GET_FEATURES, None),
        (f"{GET_FEATURES}vhost_user_write req:6 flags:0x1\n", "SET_LOG_BASE"),
        ("vhost_user_write req:11 (GET_VRING_BASE) flags:0x1\n", "GET_VRING_BASE"),
        ("7@1700000000.5:vhost_user_write req:11 flags:0x9\n", "GET_VRING_BASE"),
        ("vhost_user_write req:5 flags:0x1\n", None),  # no answer is expected
        ("vhost_user_write req:5 flags:0x9\n", "SET_MEM_TABLE"),
        ("vhost_user_write req:99 flags:0x9\n", "message 99"),
        (f"{'x' * 9000}\nvhost_user_write req:1 flags:0x1\nsomething else\n", "GET_FEATURES"),
        ("", None),
    ],
)
def test_the_last_message_counts_until_its_answer_comes(
    trace: str, message: str | None, tmp_path: Path
) -> None:
    log = tmp_path / "trace"
    log.write_text(trace)
    assert unanswered(log) == message


def test_without_trace_events_no_message_is_named(tmp_path: Path) -> None:
    assert unanswered(tmp_path / "none") is None


def test_each_page_for_which_a_device_waits_is_counted(tmp_path: Path) -> None:
    log = tmp_path / "trace"
    assert page_faults(log) == 0
    fault = "vhost_user_postcopy_fault_handler vhost-user: @0x7f24b2905000 nregions:1\n"
    found = "vhost_user_postcopy_fault_handler_found fault @0x1000 (region 1) from 0x0\n"
    log.write_text(f"{GET_FEATURES}{fault}{found}{GET_FEATURES}7@1700000000.5:{fault}")
    assert page_faults(log) == 2


def test_each_log_that_qemu_sends_counts_once(tmp_path: Path) -> None:
    log = tmp_path / "trace"
    assert logs_installed(log) == 0
    set_log_base = "vhost_user_write req:6 flags:0x1\nvhost_user_read req:6 flags:0x5\n"
    named = "7@1700000000.5:vhost_user_write req:6 (SET_LOG_BASE) flags:0x1\n"
    log.write_text(f"{GET_FEATURES * 3}{set_log_base}{GET_FEATURES}{named}")
    assert logs_installed(log) == 2
