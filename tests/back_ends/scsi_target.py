"""A third-party vhost-user-scsi target: a virtio SCSI host with one disk, on dmaproof's session.

Run with the path to listen on, the disk's image file, and optionally a fault to inject (one of
`dmaproof.faults`). The target logs each write at once: data, responses and used rings.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence
from typing import ClassVar, Final
from unittest import mock

import unobserved
from dmaproof.devices import VirtioDevice
from dmaproof.devices.segments import gather, scatter, take
from dmaproof.dma import Dma
from dmaproof.errors import ProtocolError
from dmaproof.journal import WriteKind
from dmaproof.vhost_user import __main__ as device_process
from dmaproof.virtqueue import DescriptorChain
from scsi_disk import CheckConditionError, OverrunError, ScsiDisk

_F_CHANGE: Final = 1 << 2
"""QEMU's vhost-user-scsi offers this feature to the guest even if the back end does not (property
param_change), and sends it in SET_FEATURES. A target that never changes has no such event."""
_CONTROL, _EVENT = 0, 1
_FIXED_QUEUES: Final = 2
"""The queues before the request queues (virtio 1.2, section 5.6.2)."""
_MOST_REQUEST_QUEUES: Final = 16

_REQUEST: Final = struct.Struct("<8sQBBB32s")
"""The driver's part of struct virtio_scsi_req_cmd: LUN, id, attributes, CDB (section 5.6.6.1)."""
_RESPONSE: Final = struct.Struct("<IIHBB96s")
"""The device's part: length of the sense data, residual, qualifier, status, response, sense."""
GOOD, CHECK_CONDITION = 0x00, 0x02
OK, OVERRUN, BAD_TARGET, FAILURE = 0, 1, 3, 9

_TASK_MANAGEMENT, _NOTIFICATION_QUERY, _NOTIFICATION_SUBSCRIBE = 0, 1, 2
_ANSWER_BYTES: Final = {
    _TASK_MANAGEMENT: b"",
    _NOTIFICATION_QUERY: bytes(4),
    _NOTIFICATION_SUBSCRIBE: bytes(4),
}
"""What precedes the response to each type of control request: the events, of which none exists."""


class ScsiTarget(VirtioDevice):
    """A SCSI host (virtio 1.2, section 5.6) with target 0, whose logical unit 0 is `disk`."""

    name: ClassVar[str] = "scsi"
    features = _F_CHANGE
    queues = _FIXED_QUEUES + _MOST_REQUEST_QUEUES

    def __init__(self, disk: ScsiDisk) -> None:
        self._disk = disk

    @staticmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        device = (f"vhost-user-scsi-pci,chardev={chardev}", f"num_queues={queues}")
        return ["-device", ",".join((*device, *properties))]

    def is_ready(self, queue: int) -> bool:
        """Return False for the event queue: the target reports no events."""
        return queue != _EVENT

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        self.begin_request(dma)
        if dma.journal.queue == _CONTROL:
            return self._control(chain, dma)
        header = gather(take(chain.readable, 0, _REQUEST.size), dma)
        room = sum(length for _, length in chain.writable) - _RESPONSE.size
        if len(header) < _REQUEST.size or room < 0:
            raise ProtocolError(
                f"SCSI request {self.requests}: expected {_REQUEST.size} readable and "
                f"{_RESPONSE.size} writable bytes, got {len(header)} and {room + _RESPONSE.size}"
            )
        sent = gather(take(chain.readable, _REQUEST.size, None), dma)
        address, *_, cdb = _REQUEST.unpack(header)
        data, sense, response = b"", b"", OK
        if address[:2] != b"\1\0" or address[2] & 0xC0 != 0x40:  # target 0, flat addressing
            response = BAD_TARGET
        else:
            lun = int.from_bytes(address[2:4]) & 0x3FFF
            try:
                data = self._disk.execute(lun, cdb, sent)
            except CheckConditionError as error:
                sense = error.sense
            except OverrunError:
                response = OVERRUN
        if len(data) > room:
            data, response = b"", OVERRUN
        scatter(data, take(chain.writable, _RESPONSE.size, None), dma)
        used = len(sent) + len(data) if response == OK and not sense else 0
        answer = _RESPONSE.pack(
            len(sense),
            len(sent) + room - used,
            0,
            CHECK_CONDITION if sense else GOOD,
            response,
            sense,
        )
        _respond(answer, chain, dma)
        return _RESPONSE.size + len(data)

    def _control(self, chain: DescriptorChain, dma: Dma) -> int:
        """Answer a request of the control queue (section 5.6.6.2).

        No command is ever under way when the target takes the next request, so each task management
        function is complete at once.
        """
        kind = gather(take(chain.readable, 0, 4), dma)
        number = int.from_bytes(kind, "little")
        events = _ANSWER_BYTES.get(number)
        answer = bytes((FAILURE,)) if events is None else events + bytes((OK,))
        if len(kind) < 4 or sum(length for _, length in chain.writable) < len(answer):
            raise ProtocolError(
                f"SCSI control request {self.requests} is shorter than its type requires"
            )
        return _respond(answer, chain, dma)


def _respond(answer: bytes, chain: DescriptorChain, dma: Dma) -> int:
    position = 0
    for iova, length in take(chain.writable, 0, len(answer)):
        dma.write(iova, answer[position : position + length], WriteKind.STATUS)
        position += length
    return position


def main() -> int:
    """Serve the image of the command line."""
    path, image, *fault = sys.argv[1:]
    target = ScsiTarget(ScsiDisk(os.open(image, os.O_RDWR | os.O_CLOEXEC)))
    with mock.patch.object(device_process, "make_device", return_value=target):
        options = ("--fault", *fault) if fault else ()
        return unobserved.serve(path, "--harvest", "immediate", *options)


if __name__ == "__main__":
    sys.exit(main())
