"""One front end's session: memory, rings, features and the dirty log, from connect to disconnect.

The life of the dirty log (vhost-user specification, "Migration"): SET_LOG_BASE passes its memory,
SET_FEATURES with VHOST_F_LOG_ALL switches logging on, and SET_VRING_ADDR arrives again for each
ring with the log address of its used ring. SET_LOG_BASE can arrive again while logging is on. The
answer to GET_VRING_BASE says that the ring has stopped, so the collector harvests first.

Behind a virtual IOMMU ("IOMMU support") rings and requests are addressed by IOVA, and IOTLB_MSG
carries the mappings. The session asks for missing mappings, and serves other rings until they
arrive; it takes a request only when all of its addresses are known. Before the session answers the
removal of a mapping, it harvests the mapping: afterwards the guest may reuse the pages.

On the destination of a postcopy migration, guest RAM arrives while the rings run. POSTCOPY_ADVISE
opens the userfaultfd, and POSTCOPY_LISTEN precedes the memory table. The answer to that table has
the addresses of the mappings in this process. The front end then acknowledges the answer. It can
serve faults only from then on, so only then the session registers and uses the mappings.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from .._userfault import Userfault
from ..collector import Collector
from ..devices import VirtioDevice
from ..dirty_log import VhostDirtyLog, log_bytes_needed
from ..dirty_tracker import DirtyTracker, EmulatedTracker
from ..dma import Dma
from ..errors import (
    BitmapError,
    IotlbMissError,
    MemoryAccessError,
    ProtocolError,
    TrackerError,
)
from ..guest_memory import WRITE, Bus, GuestMemory, IovaMap, MemorySlot, map_slot
from ..iotlb import Entry, Iotlb, Miss
from ..system_errors import NO_ROOM
from ..virtqueue import MAX_QUEUE_SIZE
from .backend_channel import BackendChannel
from .connection import Connection
from .features import (
    F_ACCESS_PLATFORM,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    PROTOCOL_FEATURES,
    TRANSPORT_FEATURES,
)
from .inflight import InflightRegions, make_file
from .keeper import Keeper
from .messages import (
    ConfigAccess,
    IotlbEvent,
    Message,
    ProtocolFeature,
    Request,
    VringState,
    decode_config,
    decode_inflight,
    decode_iotlb,
    decode_log_base,
    decode_memory_table,
    decode_u64,
    decode_vring_address,
    decode_vring_file,
    decode_vring_state,
    encode_config,
    encode_inflight,
    encode_memory_table,
    encode_reply,
    encode_u64,
    encode_vring_state,
)
from .vring import Vring

_FRONT_END_FEATURES: Final = F_LOG_ALL | F_PROTOCOL_FEATURES
"""Features that the front end accepts and the guest's driver never sees."""
_MESSAGES_PER_TURN: Final = 16
"""The most messages served in a turn, so that one front end cannot keep the process busy."""
_MAX_GUEST_BYTES: Final = 1 << 40
"""Trackers and traces store some bytes per page; a sparse file costs the front end nothing."""
_CONFIG_BYTES: Final = 256

OnEvent = Callable[[dict[str, Any]], None]


class _ReplyWithFile(NamedTuple):
    """An answer with a file descriptor, which the session closes after sending it."""

    payload: bytes
    fd: int


class Session:
    """Serves one front end with a device; `Server` makes a session for each connection.

    Args:
        connection: the vhost-user connection to the front end.
        device: the device.
        tracker: remembers what the device writes.
        selector: calls the `data` of a key when the key's file descriptor is readable.
        immediate: whether each write is harvested at once.
        withheld: feature bits of the device that are not offered.
        make_dma: makes the `Dma` for each memory table, from the arguments of `Dma`.
        make_collector: makes the collector, from the tracker.
        map_bus: maps bus addresses to a memory table and returns the mapping; not called behind a
            virtual IOMMU.
        on_event: called with each event of the session.
        state: the folder in which the session saves the state that a restarted process needs.
    """

    def __init__(
        self,
        connection: Connection,
        device: VirtioDevice,
        tracker: EmulatedTracker,
        selector: selectors.BaseSelector,
        *,
        immediate: bool = False,
        withheld: int = 0,
        make_dma: Callable[..., Dma] = Dma,
        make_collector: Callable[[DirtyTracker], Collector] = Collector,
        map_bus: Callable[[GuestMemory], Bus] = IovaMap.identity,
        on_event: OnEvent = lambda event: None,
        state: Path | None = None,
    ) -> None:
        self.connection = connection
        self._keeper = Keeper(state)
        self.journal = self._keeper.journal
        self.collector = make_collector(tracker)
        self.memory = GuestMemory(())
        self.bus: Bus = IovaMap(())
        self._device = device
        self._tracker = tracker
        self._immediate = immediate
        self._make_dma = make_dma
        self._map_bus = map_bus
        self._on_event = on_event
        self.dma = self._new_dma()
        self._features = 0
        self._offered = (device.features | TRANSPORT_FEATURES) & ~withheld
        self._offered_protocol = PROTOCOL_FEATURES
        if not device.config():  # QEMU warns if a device without configuration offers CONFIG
            self._offered_protocol &= ~ProtocolFeature.CONFIG
        self._acknowledge = False
        self._selector = selector
        self._channel: BackendChannel | None = None
        self._vrings = [Vring(index, selector) for index in range(device.queues)]
        self._log: VhostDirtyLog | None = None
        self._log_bytes = 0
        self._inflight: InflightRegions | None = None
        self._predecessor_died = False
        """Whether the previous process died, perhaps while logging was on."""
        self._userfault: Userfault | None = None
        self._listens = False
        """Whether memory tables are those of a postcopy, until its end."""
        self._arriving: GuestMemory | None = None
        """A memory table that the front end has not acknowledged yet."""
        self._must_report_all = False
        """Whether all pages must be reported, because a killed process may have left some out."""

    # Messages -----------------------------------------------------------------------------------

    def receive(self) -> None:
        """Serve the messages that have arrived, up to the limit of a turn.

        Raises:
            ProtocolError: the front end broke the specification, or asks for too much.
            EOFError: the front end has disconnected.
            OSError: the disk has no space for the session's state.
        """
        for message in itertools.islice(self.connection.receive(), _MESSAGES_PER_TURN):
            try:
                reply = _HANDLERS[message.request](self, message)
            except (
                *(MemoryAccessError, BitmapError, TrackerError),
                *(MemoryError, OSError),
            ) as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise  # the session's own state does not fit on the disk
                raise ProtocolError(f"{message.request.name}: {error}") from error
            finally:
                for fd in message.fds:
                    os.close(fd)
                self.memory.check()
            if isinstance(reply, _ReplyWithFile):
                self.connection.send(encode_reply(message.request, reply.payload), [reply.fd])
                os.close(reply.fd)
                continue
            if reply is None and message.needs_reply and self._acknowledge:
                reply = encode_u64(0)
            if reply is not None:
                self.connection.send(encode_reply(message.request, reply))

    def _get_features(self, message: Message) -> bytes:
        return encode_u64(self._offered)

    def _set_features(self, message: Message) -> None:
        features = decode_u64(message)
        if unknown := features & ~self._offered:
            raise ProtocolError(f"SET_FEATURES: bits {unknown:#x} were not offered")
        bus_changed = (features ^ self._features) & F_ACCESS_PLATFORM
        self._features = features
        if bus_changed:
            self._reset_bus()
        self._on_event({"event": "features", "accepted": features & ~_FRONT_END_FEATURES})
        if not features & F_PROTOCOL_FEATURES:  # SET_VRING_ENABLE does not exist without them
            for vring in self._vrings:
                vring.enabled = True
        if features & F_LOG_ALL:
            self._start_logging()
        elif self.collector.active:
            self.collector.stop()
            self.journal.stop()
            self._on_event({"event": "logging", "on": False})

    def _get_protocol_features(self, message: Message) -> bytes:
        return encode_u64(self._offered_protocol)

    def _set_protocol_features(self, message: Message) -> None:
        features = decode_u64(message)
        if unknown := features & ~self._offered_protocol:
            raise ProtocolError(f"SET_PROTOCOL_FEATURES: bits {unknown:#x} were not offered")
        self._acknowledge = bool(features & ProtocolFeature.REPLY_ACK)

    def _get_queue_num(self, message: Message) -> bytes:
        return encode_u64(self._device.queues)

    def _accept(self, message: Message) -> None:
        """Accept SET_OWNER, SET_VRING_ERR, …, which need no action."""

    def _set_mem_table(self, message: Message) -> bytes | None:
        if self._arriving is not None and not message.fds:
            self._take_arriving_memory(message, self._arriving)
            return None
        regions = decode_memory_table(message)
        if (total := sum(region.length for region in regions)) > _MAX_GUEST_BYTES:
            raise ProtocolError(
                f"SET_MEM_TABLE: {total:#x} bytes of RAM exceed the {_MAX_GUEST_BYTES:#x} that can "
                "be tracked"
            )
        slots: list[MemorySlot] = []
        for region, fd in zip(regions, message.fds, strict=True):
            slots.append(
                map_slot(
                    fd,
                    gpa=region.gpa,
                    length=region.length,
                    hva=region.hva,
                    file_offset=region.file_offset,
                )
            )
        memory = GuestMemory(slots)
        if self._listens:
            self._arriving = memory
            return encode_memory_table(
                [
                    region._replace(hva=slot.address)
                    for region, slot in zip(regions, slots, strict=True)
                ]
            )
        self._use_memory(memory, message.request)
        return None

    def _take_arriving_memory(self, message: Message, memory: GuestMemory) -> None:
        decode_u64(message)
        assert self._userfault is not None
        for slot in memory.slots:
            self._userfault.register(slot.mapping)
        self._arriving = None
        self._use_memory(memory, message.request)

    def _use_memory(self, memory: GuestMemory, request: Request) -> None:
        self.collector.harvest()  # while the bus still maps to the RAM that was written
        if self._log is not None or self.collector.active:
            _check_log_covers(self._log_bytes, memory, request)
        self.memory = memory
        self._reset_bus()

    def _reset_bus(self) -> None:
        """Map bus addresses to the current memory table; behind a virtual IOMMU, map none.

        The mappings of a virtual IOMMU refer to HVAs of the previous memory table.
        """
        self.bus = Iotlb() if self._features & F_ACCESS_PLATFORM else self._map_bus(self.memory)
        self.collector.remap(self.memory, self.bus)
        self.dma = self._new_dma()
        for vring in self._vrings:
            if vring.runs:
                self._start_ring(vring)

    def _set_log_base(self, message: Message) -> bytes:
        size, offset = decode_log_base(message)
        _check_log_covers(size, self.memory, message.request)
        log = VhostDirtyLog(message.fds[0], size, offset)
        self._log_bytes = size
        if self.collector.active:
            self.collector.switch_log(log)
        else:
            self._drop_unused_log()
            self._log = log
            if self._features & F_LOG_ALL:
                self._start_logging()
        return encode_u64(0)

    def _start_logging(self) -> None:
        if self._log is None:  # logging is on already, or starts with SET_LOG_BASE
            return
        log, self._log = self._log, None
        self.collector.start(log, self.memory, self.bus)
        if not (self._predecessor_died and self._keeper.resume(self.collector)):
            self.journal.start()
        if self._must_report_all:
            self.collector.harvest_everything()
        self._predecessor_died = self._must_report_all = False
        self._keeper.keep(self.collector, self.memory)
        self._on_event({"event": "logging", "on": True})

    def _drop_unused_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _get_inflight_fd(self, message: Message) -> _ReplyWithFile:
        asked = decode_inflight(message)
        if asked.queues > self._device.queues or not 0 < asked.queue_size <= MAX_QUEUE_SIZE:
            raise ProtocolError(
                f"GET_INFLIGHT_FD: {asked.queues} rings of {asked.queue_size}, but the device has "
                f"{self._device.queues} rings of up to {MAX_QUEUE_SIZE}"
            )
        fd, file = make_file(asked.queues, asked.queue_size)
        return _ReplyWithFile(encode_inflight(file), fd)

    def _set_inflight_fd(self, message: Message) -> None:
        file = decode_inflight(message)
        regions = InflightRegions(message.fds[0], file)
        self._inflight = regions
        self._predecessor_died = self._must_report_all = regions.predecessor_died

    def _vring(self, message: Message, index: int) -> Vring:
        if index >= len(self._vrings):
            raise ProtocolError(
                f"{message.request.name}: ring {index}, but the device has only "
                f"{len(self._vrings)} rings"
            )
        return self._vrings[index]

    def _set_vring_num(self, message: Message) -> None:
        index, size = decode_vring_state(message)
        self._vring(message, index).size = size

    def _set_vring_base(self, message: Message) -> None:
        index, base = decode_vring_state(message)
        self._vring(message, index).base = base

    def _set_vring_addr(self, message: Message) -> None:
        address = decode_vring_address(message)
        vring = self._vring(message, address.ring)
        vring.address = address
        if vring.runs:
            self._start_ring(vring)

    def _set_vring_enable(self, message: Message) -> None:
        index, enabled = decode_vring_state(message)
        vring = self._vring(message, index)
        vring.enabled = bool(enabled)
        vring.pending = True
        self._try_start_ring(vring)

    def _set_vring_kick(self, message: Message) -> None:
        index, has_fd = decode_vring_file(message)
        vring = self._vring(message, index)
        if not has_fd:
            raise ProtocolError(
                "SET_VRING_KICK: no kick file descriptor, but polling of a ring was not offered"
            )
        _check_event_fd(message)
        vring.set_kick(message.fds[0])
        self._try_start_ring(vring)

    def _set_vring_call(self, message: Message) -> None:
        index, has_fd = decode_vring_file(message)
        if has_fd:
            _check_event_fd(message)
        self._vring(message, index).set_call(message.fds[0] if has_fd else None)

    def _get_vring_base(self, message: Message) -> bytes:
        index, _ = decode_vring_state(message)
        vring = self._vring(message, index)
        vring.stop()
        self.collector.flush()
        if not self.running:
            self.collector.trace.freeze()
            self._forget_mappings()
        return encode_vring_state(VringState(index, vring.base))

    def _reset_device(self, message: Message) -> None:
        for vring in self._vrings:
            vring.stop()
            vring.enabled = False
        self.collector.flush()
        self._forget_mappings()

    def _get_config(self, message: Message) -> bytes:
        offset, flags, space = decode_config(message)
        config = self._device.config().ljust(_CONFIG_BYTES, b"\0")
        if offset + len(space) > len(config):
            raise ProtocolError(
                f"GET_CONFIG: {len(space)} bytes at offset {offset} exceed the {len(config)} bytes "
                "of configuration"
            )
        return encode_config(ConfigAccess(offset, flags, config[offset : offset + len(space)]))

    # Postcopy -----------------------------------------------------------------------------------

    def _postcopy_advise(self, message: Message) -> _ReplyWithFile:
        self._end_postcopy()
        self._userfault = Userfault(self.connection.fileno())
        return _ReplyWithFile(b"", os.dup(self._userfault.fileno()))

    def _postcopy_listen(self, message: Message) -> bytes:
        if self._userfault is None:
            raise ProtocolError("POSTCOPY_LISTEN: expected POSTCOPY_ADVISE before it")
        self._listens = True
        self.journal.start()  # until the end, RAM differs from the source's by these writes
        self._on_event({"event": "postcopy", "listens": True})
        return encode_u64(0)

    def _postcopy_end(self, message: Message) -> bytes:
        self._end_postcopy()
        self._on_event({"event": "postcopy", "listens": False})
        return encode_u64(0)

    def _end_postcopy(self) -> None:
        self._listens, self._arriving = False, None
        if self._userfault is not None:
            self._userfault.close()
            self._userfault = None

    # The virtual IOMMU --------------------------------------------------------------------------

    def _set_backend_req_fd(self, message: Message) -> None:
        if len(message.fds) != 1:
            raise ProtocolError(
                f"SET_BACKEND_REQ_FD: got {len(message.fds)} file descriptors, expected 1"
            )
        channel = BackendChannel(message.fds[0], self._selector)
        if self._channel is not None:
            self._channel.close()
            for vring in self._vrings:
                vring.resume()  # it asks again over the new channel
        self._channel = channel

    def _iotlb_msg(self, message: Message) -> None:
        change = decode_iotlb(message)
        if not isinstance(self.bus, Iotlb):
            raise ProtocolError("IOTLB_MSG: VIRTIO_F_ACCESS_PLATFORM was not accepted")
        if change.event == IotlbEvent.INVALIDATE:
            self._unmap(self.bus, change.iova, change.size)
            return
        gpa = self.memory.gpa_of_hva(change.hva, change.size)
        entry = self.bus.with_known_access(Entry(change.iova, gpa, change.size, change.access))
        if self.bus.holds(entry):
            return
        self._unmap(self.bus, change.iova, change.size)
        if not self.bus.has_room_for(entry):
            self._unmap(self.bus, 0, 1 << 64)  # the device asks again for what it still needs
            self.bus.clear()
        if self.bus.add(entry):
            self.collector.remap(self.memory, self.bus)

    def _unmap(self, bus: Iotlb, iova: int, length: int) -> None:
        """Harvest, then forget, the mappings that overlap `length` bytes at `iova`."""
        if mappings := bus.overlapping(iova, length):
            self.collector.unmap(mappings)
            bus.remove(iova, length)
            for mapping in mappings:
                for vring in self._vrings:
                    vring.unmap(mapping.iova, mapping.length)

    def _forget_mappings(self) -> None:
        """Forget all mappings: QEMU does not report removals for stopped rings (vhost_dev_stop)."""
        if isinstance(self.bus, Iotlb):
            self.bus.clear()
        if self._channel is not None:
            self._channel.forget_requests()

    def _ask(self, missing: Sequence[tuple[int, int]]) -> None:
        """Ask the front end for the pages that an IOTLB does not know.

        Raises:
            ProtocolError: the front end gave no back-end channel, or does not read it.
            EOFError: the front end has disconnected.
        """
        if self._channel is None or not self._acknowledge:
            raise ProtocolError(
                f"IOVA {missing[0][0]:#x} is not in the IOTLB, and the device cannot ask for it: "
                "behind an IOMMU the front end must send SET_BACKEND_REQ_FD and accept the "
                "protocol feature REPLY_ACK"
            )
        self._channel.ask(Miss(*page) for page in missing)

    def _handle_answers(self, channel: BackendChannel) -> None:
        """Resume the waiting rings when all requests for mappings are answered.

        Raises:
            MemoryAccessError: the guest's IOMMU has no such mapping.
            ProtocolError, EOFError: see `BackendChannel.answers`.
        """
        answers = channel.answers()
        for miss, mapped in answers:
            if miss is not None and not mapped:
                verb = "write to" if miss.access & WRITE else "read from"
                raise MemoryAccessError(
                    f"IOVA {miss.iova:#x}: the guest's IOMMU does not permit the device to {verb} "
                    "it"
                )
        if answers and not channel.waiting:
            for vring in self._vrings:
                vring.resume()

    # Rings --------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether any ring runs."""
        return any(vring.runs for vring in self._vrings)

    def _new_dma(self) -> Dma:
        return self._make_dma(
            self.memory,
            self.bus,
            self._tracker,
            self.journal,
            due_epoch=self.collector.due_epoch,
            after_write=self.collector.harvest_write if self._immediate else None,
        )

    def _try_start_ring(self, vring: Vring) -> None:
        if not vring.runs and vring.may_run:
            self._start_ring(vring)

    def _start_ring(self, vring: Vring) -> None:
        with contextlib.suppress(IotlbMissError):  # `_serve` asks for the missing pages
            self._start(vring)

    def _start(self, vring: Vring) -> None:
        if not vring.runs:
            self._keeper.number_requests(self._device)
        if not self._features & F_LOG_ALL:
            # Without logging QEMU has not sent any page yet, or will send all of them again.
            self._predecessor_died = self._must_report_all = False
        inflight = self._inflight.region(vring.index, vring.size) if self._inflight else None
        self.collector.trace.thaw()
        vring.start(self.dma, self.memory, self._features, inflight)

    def serve_rings(self) -> bool:
        """Serve the requests that the driver has made available.

        Returns:
            True if requests are left for the next turn.

        Raises:
            ProtocolError, MemoryAccessError: the driver broke the specification.
            EOFError: the front end has disconnected.
        """
        if self._channel is not None:
            self._handle_answers(self._channel)
        if self._features & F_LOG_ALL and not self.collector.active:
            return False  # writes before SET_LOG_BASE could not be reported
        try:
            for vring in self._vrings:
                if vring.has_work(self._device):
                    self._serve(vring)
        finally:
            self.memory.check()  # a truncated slot is the cause of any other error
            if self._inflight is not None:
                self._inflight.check()
        return any(vring.has_work(self._device) for vring in self._vrings)

    def _serve(self, vring: Vring) -> None:
        try:
            if not vring.has_addresses:
                self._start(vring)
            vring.serve(self._device, self.dma)
        except IotlbMissError as miss:
            self._ask(miss.missing)
            vring.wait_for_iommu()

    def harvest(self) -> int:
        """Harvest the dirty pages into the log.

        Returns:
            The number of dirty pages found.
        """
        pages = self.collector.harvest()
        self._keeper.keep(self.collector, self.memory)
        return pages

    def close(self) -> None:
        """Stop the rings, and release every file descriptor and mapping.

        Journal and trace stay readable.
        """
        for vring in self._vrings:
            vring.close()
        with contextlib.suppress(ProtocolError):  # a truncated log cannot take the last harvest
            self.collector.stop()
        self._drop_unused_log()
        self._end_postcopy()
        self._inflight = None
        if self._channel is not None:
            self._channel.close()
        self.memory, self.bus = GuestMemory(()), IovaMap(())
        self.dma = self._new_dma()
        self.journal.close()
        self.connection.close()


def _check_log_covers(log_bytes: int, memory: GuestMemory, request: Request) -> None:
    needed = log_bytes_needed(memory.end)
    if log_bytes < needed:
        raise ProtocolError(
            f"{request.name}: a dirty log of {log_bytes} bytes is too small: guest RAM ends at GPA "
            f"{memory.end:#x}, which needs {needed} bytes"
        )


def _check_event_fd(message: Message) -> None:
    """Refuse everything except eventfds: a write to another file may fail, block or change data."""
    kind = str(Path(f"/proc/self/fd/{message.fds[0]}").readlink())
    if kind != "anon_inode:[eventfd]":
        raise ProtocolError(
            f"{message.request.name}: the file descriptor is {kind}, not an eventfd"
        )


_HANDLERS: Final[dict[Request, Callable[[Session, Message], bytes | _ReplyWithFile | None]]] = {
    Request.GET_FEATURES: Session._get_features,
    Request.SET_FEATURES: Session._set_features,
    Request.SET_OWNER: Session._accept,
    Request.RESET_OWNER: Session._accept,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.SET_LOG_BASE: Session._set_log_base,
    Request.SET_LOG_FD: Session._accept,
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.GET_VRING_BASE: lambda session, message: session._get_vring_base(message),
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call,
    Request.SET_VRING_ERR: Session._accept,
    Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.GET_QUEUE_NUM: Session._get_queue_num,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
    Request.IOTLB_MSG: Session._iotlb_msg,
    Request.GET_CONFIG: Session._get_config,
    Request.SET_CONFIG: Session._accept,
    Request.POSTCOPY_ADVISE: Session._postcopy_advise,
    Request.POSTCOPY_LISTEN: Session._postcopy_listen,
    Request.POSTCOPY_END: Session._postcopy_end,
    Request.GET_INFLIGHT_FD: Session._get_inflight_fd,
    Request.SET_INFLIGHT_FD: lambda session, message: session._set_inflight_fd(message),
    Request.RESET_DEVICE: Session._reset_device,
}
