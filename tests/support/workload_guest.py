"""guests/workload.c driven by a test: planned requests, served by a disk in Python."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dmaproof.stamp import SECTORS_PER_PAGE, stamped_page
from dmaproof.units import PAGE_BYTES
from qmp_tools.guest.build import compile_c, sources
from qmp_tools.guest.channel import GuestReport, parse_line
from qmp_tools.guest.workload import Workload

DISK_SECTORS = 1 << 24
HUGE_PAGES = 256
OWN_PAGES = 4
READ, WRITE, READ_BACK = range(3)
OWN, HOT, ONCE = range(3)

_UNTOUCHED = 0xFFFFFFFF


class Worker(ctypes.Structure):
    """struct worker of workload.h."""

    _fields_ = (("random", ctypes.c_uint64), ("own", ctypes.c_uint32))


class Request(ctypes.Structure):
    """struct request of workload.h."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("region", ctypes.c_int),
        ("sector", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
        ("piece_bytes", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("newest_before", ctypes.c_uint64),
        ("pages", ctypes.c_uint32 * HUGE_PAGES),
    )

    @property
    def taken(self) -> list[int]:
        """The pages of the buffer in the request."""
        return list(self.pages[: self.count])


def build(folder: Path) -> Path:
    """Compile the workload for tests; every copy of the result has its own state."""
    target = folder / "workload.so"
    files = [Path(__file__).with_suffix(".c"), sources() / "workload.c"]
    options = ("-std=c11", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    compile_c(files, target, *options)
    return target


class WorkloadGuest:
    """One guest, with the `written` blocks of its disk and the last request number `served`."""

    def __init__(self, built: Path, copy: Path, workload: Workload) -> None:
        shutil.copyfile(built, copy)
        self.library = ctypes.CDLL(str(copy))
        self.library.prepare_workload.restype = ctypes.c_char_p
        self.library.prepare_workload.argtypes = [ctypes.c_uint64]
        self.library.new_worker.restype = Worker
        self.library.new_worker.argtypes = [ctypes.c_uint64]
        self.library.plan_request.restype = ctypes.c_bool
        self.library.read_parameter.restype = ctypes.c_bool
        self.library.piece_at.restype = ctypes.c_void_p
        self.library.page_at.restype = ctypes.c_void_p
        self.library.page_at.argtypes = [ctypes.c_uint64]
        self.library.finish_request.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.library.everything_reported.restype = ctypes.c_char_p
        for parameter in str(workload).split():
            assert self.library.read_parameter(parameter.encode()), parameter
        self.problem: bytes | None = self.library.prepare_workload(DISK_SECTORS)
        self.served = 0
        self.written: dict[int, bytes] = {}

    def worker(self, number: int = 0) -> Worker:
        """Return a new worker."""
        worker: Worker = self.library.new_worker(number)
        return worker

    def plan(self, worker: Worker) -> Request:
        """Plan the worker's next request."""
        request = Request()
        ctypes.memset(ctypes.byref(request.pages), 0xFF, ctypes.sizeof(request.pages))
        while not self.library.plan_request(ctypes.byref(worker), ctypes.byref(request)):
            pass
        assert request.pages[request.count] == _UNTOUCHED if request.count < HUGE_PAGES else True
        return request

    def pieces(self, request: Request) -> list[int]:
        """Return the addresses of the request's pieces."""
        count = self.library.pieces_of(ctypes.byref(request))
        return [self.library.piece_at(ctypes.byref(request), piece) for piece in range(count)]

    def serve(self, request: Request, change: Callable[[bytes], bytes] = bytes) -> None:
        """Serve a request as the device does; `change` corrupts the data of a read."""
        self.served += 1
        lbas = [request.sector + SECTORS_PER_PAGE * page for page in range(request.count)]
        pieces = self.pieces(request)
        if request.kind == WRITE:
            assert request.count == 1
            self.written[request.sector] = ctypes.string_at(pieces[0], PAGE_BYTES)
            return
        data = change(
            b"".join(self.written.get(lba) or stamped_page(lba, self.served) for lba in lbas)
        )
        for index, address in enumerate(pieces):
            piece = data[index * request.piece_bytes :][: request.piece_bytes]
            ctypes.memmove(address, piece, len(piece))

    def finish(self, request: Request, done: int | None = None) -> None:
        """Let the guest check the request; `done` is the number of bytes, by default all."""
        moved = request.count * PAGE_BYTES if done is None else done
        self.library.finish_request(ctypes.byref(request), moved)

    def run(self, worker: Worker, requests: int) -> list[Request]:
        """Plan, serve and finish several requests."""
        done = []
        for _ in range(requests):
            request = self.plan(worker)
            self.serve(request)
            self.finish(request)
            done.append(request)
        return done

    def page(self, number: int) -> int:
        """Return the address of a page of the buffer."""
        address: int = self.library.page_at(number)
        return address

    def obey(self, command: str) -> None:
        """Send a command to the guest."""
        self.library.obey(ctypes.c_char(command.encode()))

    @property
    def lines(self) -> list[str]:
        """The verbs of all reports."""
        return [
            line.split()[0] for line in self.library.everything_reported().decode().splitlines()
        ]

    def reports(self, verb: str) -> list[GuestReport]:
        """Return the reports with `verb`."""
        lines = self.library.everything_reported().decode().splitlines()
        return [report for report in map(parse_line, lines) if report.verb == verb]


@dataclass(frozen=True)
class WorkloadGuests:
    """A factory of guests, with copies of the `built` library in `folder`."""

    built: Path
    folder: Path

    def __call__(self, **parameters: int | str) -> WorkloadGuest:
        """Make a new guest; `parameters` are those of `Workload`."""
        copy = self.folder / f"{len(list(self.folder.iterdir()))}.so"
        return WorkloadGuest(self.built, copy, Workload(**parameters))  # type: ignore[arg-type]
