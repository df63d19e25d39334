"""Migration tests with the two clients of qemu.qmp; the lines marked 'all RAM' check all RAM."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
import unittest
from typing import Any

from qemu.qmp import QMPClient
from qemu.qmp.legacy import QEMUMonitorProtocol

from qmp_tools import aio, check

BINARY = os.environ.get("QEMU", "qemu-system-x86_64")
OPTIONS = ["-nodefaults", "-display", "none", "-accel", "tcg", "-m", "65544K"]
DESTINATION = ["-S", "-incoming", "defer"]


class BlockingClient(unittest.TestCase):
    """Migrate a guest that runs its firmware."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def start(self, name: str, *arguments: str) -> Any:
        path = f"{self.folder}/{name}"
        monitor = QEMUMonitorProtocol(path, server=True)
        self.addCleanup(monitor.close)
        qemu = subprocess.Popen([BINARY, *OPTIONS, *arguments, "-qmp", f"unix:{path}"])
        self.addCleanup(qemu.wait)
        self.addCleanup(qemu.kill)
        monitor.accept(timeout=60)
        return monitor

    def test_all_ram_is_equal(self) -> None:
        source = self.start("source")
        destination = self.start("destination", *DESTINATION)
        uri = f"unix:{self.folder}/migration"
        destination.cmd("migrate-incoming", uri=uri)
        source.cmd("migrate", uri=uri)
        for monitor in (source, destination):
            while (status := monitor.cmd("query-migrate").get("status")) != "completed":
                self.assertNotEqual(status, "failed")
                time.sleep(0.05)
        check(source, destination, resume=True).require_equal()  # all RAM
        self.assertEqual(destination.cmd("query-status")["status"], "running")


class AsynchronousClient(unittest.IsolatedAsyncioTestCase):
    """Do the same in asynchronous code."""

    async def asyncSetUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    async def start(self, name: str, *arguments: str) -> Any:
        path = f"{self.folder}/{name}"
        client = QMPClient(name)
        await client.start_server(path)
        qemu = await asyncio.create_subprocess_exec(
            BINARY, *OPTIONS, *arguments, "-qmp", f"unix:{path}"
        )
        self.addAsyncCleanup(qemu.wait)
        self.addCleanup(qemu.kill)
        self.addAsyncCleanup(client.disconnect)
        await client.accept()
        return client

    async def test_all_ram_is_equal(self) -> None:
        source = await self.start("source")
        destination = await self.start("destination", *DESTINATION)
        uri = f"unix:{self.folder}/migration"
        await destination.execute("migrate-incoming", {"uri": uri})
        await source.execute("migrate", {"uri": uri})
        for client in (source, destination):
            while (answer := await client.execute("query-migrate")).get("status") != "completed":
                self.assertNotEqual(answer.get("status"), "failed")
                await asyncio.sleep(0.05)
        (await aio.check(source, destination, resume=True)).require_equal()  # all RAM
        self.assertEqual((await destination.execute("query-status"))["status"], "running")


if __name__ == "__main__":
    unittest.main()
