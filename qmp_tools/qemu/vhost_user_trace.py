"""Find out from QEMU's own trace what its vhost-user devices do.

The trace names the messages that QEMU has sent, and counts the pages for which a device has waited.
QEMU sends vhost-user messages from the thread that holds its big lock, and waits for the answer
without a timeout. Meanwhile QEMU does not answer on QMP, so it cannot name the message. Every QEMU
with the 'log' trace back end, the default, has these trace events. In other builds QEMU prints a
warning, and the log stays empty.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_EVENT: Final = re.compile(r"vhost_user_(read|write) req:(\d+)(?: \(\w+\))? flags:(0x[0-9a-f]+)")
_FAULT: Final = b"vhost_user_postcopy_fault_handler "
_SET_LOG_BASE: Final = "6"
_TAIL_BYTES: Final = 1 << 12
_NEEDS_REPLY: Final = 1 << 3
"""A bit of a message's flags, used if the back end has agreed to REPLY_ACK."""

_ALWAYS_ANSWERED: Final = {
    1: "GET_FEATURES",
    6: "SET_LOG_BASE",
    11: "GET_VRING_BASE",
    15: "GET_PROTOCOL_FEATURES",
    17: "GET_QUEUE_NUM",
    24: "GET_CONFIG",
    26: "CREATE_CRYPTO_SESSION",
    28: "POSTCOPY_ADVISE",
    30: "POSTCOPY_END",
    31: "GET_INFLIGHT_FD",
    36: "GET_MAX_MEM_SLOTS",
    40: "GET_STATUS",
    41: "GET_SHARED_OBJECT",
    42: "SET_DEVICE_STATE_FD",
    43: "CHECK_DEVICE_STATE",
}
"""Messages with an answer of their own (vhost-user, "Front-end message types"), by number."""
_ANSWERED_IF_ASKED: Final = {
    2: "SET_FEATURES",
    3: "SET_OWNER",
    5: "SET_MEM_TABLE",
    7: "SET_LOG_FD",
    8: "SET_VRING_NUM",
    9: "SET_VRING_ADDR",
    10: "SET_VRING_BASE",
    12: "SET_VRING_KICK",
    13: "SET_VRING_CALL",
    14: "SET_VRING_ERR",
    16: "SET_PROTOCOL_FEATURES",
    18: "SET_VRING_ENABLE",
    19: "SEND_RARP",
    20: "NET_SET_MTU",
    21: "SET_BACKEND_REQ_FD",
    22: "IOTLB_MSG",
    23: "SET_VRING_ENDIAN",
    25: "SET_CONFIG",
    27: "CLOSE_CRYPTO_SESSION",
    29: "POSTCOPY_LISTEN",
    32: "SET_INFLIGHT_FD",
    33: "GPU_SET_SOCKET",
    34: "RESET_DEVICE",
    35: "VRING_KICK",
    37: "ADD_MEM_REG",
    38: "REM_MEM_REG",
    39: "SET_STATUS",
}


def trace_arguments(log: Path) -> list[str]:
    """Return the QEMU arguments that trace each message, answer and page fault to `log`."""
    events = ("vhost_user_write", "vhost_user_read", "vhost_user_postcopy_fault_handler")
    return ["-D", str(log), *(word for event in events for word in ("-trace", event))]


def page_faults(log: Path) -> int:
    """Return for how many accesses to pages that had not arrived a device has waited.

    QEMU calls vhost_user_postcopy_fault_handler for each of them.
    """
    try:
        return log.read_bytes().count(_FAULT)
    except OSError:
        return 0


def logs_installed(log: Path) -> int:
    """Return how often QEMU has sent its dirty log to a back end; 0 if QEMU does not trace."""
    try:
        events = _EVENT.findall(log.read_text(errors="replace"))
    except OSError:
        return 0
    return sum((direction, number) == ("write", _SET_LOG_BASE) for direction, number, _ in events)


def unanswered(log: Path) -> str | None:
    """Return the unanswered message, such as 'SET_LOG_BASE'; None if all have been answered."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            events = _EVENT.findall(file.read().decode(errors="replace"))
    except OSError:
        return None
    if not events:
        return None
    direction, number, flags = events[-1]
    if direction == "read":
        return None
    request = int(number)
    if name := _ALWAYS_ANSWERED.get(request):
        return name
    if int(flags, 16) & _NEEDS_REPLY:
        return _ANSWERED_IF_ASKED.get(request, f"message {request}")
    return None
