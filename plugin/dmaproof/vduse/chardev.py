"""The kernel's side of a VDUSE device: its character device in /dev/vduse."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

from ..errors import UnsupportedError, UntestableError
from . import abi

FOLDER: Final = Path("/dev/vduse")
_CONTROL: Final = FOLDER / "control"
_ALIGNMENT: Final = 4096
_LAST_ADDRESS: Final = (1 << 64) - 1


class Message(NamedTuple):
    """A message of the kernel, which waits for the answer with the same `number`."""

    type: int
    number: int
    content: bytes


class Ring(NamedTuple):
    """A virtqueue as the driver has set it up: IOVAs, and the `base` at which to continue."""

    size: int
    descriptors: int
    driver: int
    device: int
    base: int
    is_ready: bool


@dataclass(frozen=True)
class Mapped:
    """IOVAs that lead to a part of a file, whose descriptor `fd` the caller closes."""

    iova: int
    length: int
    file_offset: int
    fd: int
    file: tuple[int, int]
    """The numbers of the file's file system and inode."""


class CharacterDevice:
    """A VDUSE device that the kernel does not offer as a vDPA device until ``vdpa dev add`` is run.

    Args:
        name: the name of the device, here and for the program vdpa.
        virtio_type: the number of the device type (virtio 1.2, section 5).
        features: the virtio features (bits) that the device offers.
        queues: the number of virtqueues, and `queue_size` the most descriptors of each.
        config: the configuration space.

    Raises:
        UnsupportedError: this kernel has no VDUSE, or cannot suspend such a device.
        UntestableError: the kernel refuses to create the device.
    """

    def __init__(
        self,
        name: str,
        virtio_type: int,
        features: int,
        queues: int,
        queue_size: int,
        config: bytes,
    ) -> None:
        self._name = name.encode()
        self._queues = queues
        try:
            self._control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnsupportedError(
                f"{_CONTROL} does not exist: this kernel has no VDUSE; load the module vduse, or "
                "use a kernel with CONFIG_VDPA_USER"
            ) from None
        except PermissionError as error:
            raise UntestableError(f"{_CONTROL}: {error.strerror}; run dmaproof as root") from None
        try:
            self._create(virtio_type, features, queue_size, config)
        except UnsupportedError:
            os.close(self._control)
            raise
        except OSError as error:
            os.close(self._control)
            raise UntestableError(
                f"the kernel does not create the VDUSE device {name}: {error.strerror}; network "
                "devices need CAP_NET_ADMIN"
            ) from error

    def _create(self, virtio_type: int, features: int, queue_size: int, config: bytes) -> None:
        fcntl.ioctl(self._control, abi.SET_API_VERSION, abi.U64.pack(0))
        try:
            fcntl.ioctl(self._control, abi.SET_FEATURES, abi.U64.pack(abi.F_SUSPEND))
        except OSError as error:
            raise UnsupportedError(
                f"this kernel cannot suspend a VDUSE device ({error.strerror}), and QEMU suspends "
                "a device before it puts shadow virtqueues in front of it; use Linux 7.3 or later"
            ) from error
        header = abi.CONFIG.pack(
            *(self._name, 0, virtio_type, features, self._queues, _ALIGNMENT, 0, 0, len(config))
        )
        fcntl.ioctl(self._control, abi.CREATE_DEV, header + config)
        path = FOLDER / self._name.decode()
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        for index in range(self._queues):
            fcntl.ioctl(self.fd, abi.VQ_SETUP, abi.QUEUE_CONFIG.pack(index, queue_size, 0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Destroy the device, unless it is still a vDPA device."""
        os.close(self.fd)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._control, abi.DESTROY_DEV, self._name.ljust(abi.NAME_BYTES, b"\0"))
        os.close(self._control)

    def fileno(self) -> int:
        """Return the descriptor that is readable while a message waits."""
        return self.fd

    def messages(self) -> Iterator[Message]:
        """Yield the messages that have arrived."""
        while True:
            try:
                content = os.read(self.fd, abi.MESSAGE.size)
            except BlockingIOError:
                return
            yield Message(*abi.MESSAGE.unpack(content))

    def answer(self, message: Message, content: bytes = b"", result: int = abi.OK) -> None:
        """Answer a message; without an answer, the kernel stops the device after 30 s."""
        with contextlib.suppress(FileNotFoundError):  # the kernel does not wait any more
            os.write(self.fd, abi.ANSWER.pack(message.number, result, content))

    def ring(self, index: int) -> Ring:
        """Return a virtqueue as the driver has set it up."""
        data = bytearray(abi.QUEUE_INFO.pack(index, 0, 0, 0, 0, 0, 0))
        fcntl.ioctl(self.fd, abi.VQ_GET_INFO, data)
        _, size, descriptors, driver, device, base, ready = abi.QUEUE_INFO.unpack(data)
        return Ring(size, descriptors, driver, device, base, bool(ready))

    def features(self) -> int:
        """Return the virtio features (bits) that the driver has accepted."""
        data = bytearray(abi.U64.size)
        fcntl.ioctl(self.fd, abi.DEV_GET_FEATURES, data)
        return int(abi.U64.unpack(data)[0])

    def mapped(self) -> Iterator[Mapped]:
        """Yield all mapped IOVAs, in order."""
        first = 0
        while True:
            data = bytearray(abi.IOTLB_ENTRY.pack(0, first, _LAST_ADDRESS, 0))
            try:
                fd = fcntl.ioctl(self.fd, abi.IOTLB_GET_FD, data)
            except OSError as error:
                if error.errno == errno.EINVAL:  # no more
                    return
                raise
            offset, start, last, _ = abi.IOTLB_ENTRY.unpack(data)
            status = os.fstat(fd)
            file = status.st_dev, status.st_ino
            yield Mapped(start, last - start + 1, offset, fd, file)
            if last == _LAST_ADDRESS:
                return
            first = last + 1

    def take_kicks(self, index: int) -> int:
        """Return a new eventfd on which the driver's kicks of a virtqueue arrive.

        A reset of the device ends that.
        """
        kicks = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        fcntl.ioctl(self.fd, abi.VQ_SETUP_KICKFD, abi.QUEUE_EVENT.pack(index, kicks))
        return kicks

    def interrupt(self, index: int) -> None:
        """Interrupt the driver of a virtqueue."""
        with contextlib.suppress(OSError):  # the device was reset or suspended meanwhile
            fcntl.ioctl(self.fd, abi.VQ_INJECT_IRQ, abi.U32.pack(index))
