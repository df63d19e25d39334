"""A migration test with QEMU's class QEMUMachine; the line marked 'all RAM' checks all its RAM."""

from __future__ import annotations

import os
import tempfile
import time
import unittest

from qemu.machine import QEMUMachine

from qmp_tools import check

BINARY = os.environ.get("QEMU", "qemu-system-x86_64")


class MachineMigration(unittest.TestCase):
    """Migrate a guest that runs its firmware."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def start(self, name: str, *arguments: str) -> QEMUMachine:
        vm = QEMUMachine(BINARY, name=name, base_temp_dir=self.folder)
        vm.add_args("-nodefaults", "-accel", "tcg", "-m", "65544K", *arguments)
        self.addCleanup(vm.shutdown, hard=True)
        vm.launch()
        return vm

    def migrate(self, uri: str) -> None:
        source = self.start("source")
        destination = self.start("destination", "-S", "-incoming", "defer")
        destination.cmd("migrate-incoming", uri=uri)
        if uri.startswith("tcp"):  # QEMU has chosen the port
            address = destination.cmd("query-migrate")["socket-address"][0]
            uri = f"tcp:127.0.0.1:{address['port']}"
        source.cmd("migrate", uri=uri)
        for vm in (source, destination):
            while (status := vm.cmd("query-migrate").get("status")) != "completed":
                self.assertNotEqual(status, "failed")
                time.sleep(0.05)
        check(source, destination, resume=True).require_equal()  # all RAM
        self.assertEqual(destination.cmd("query-status")["status"], "running")

    def test_tcp(self) -> None:
        self.migrate("tcp:127.0.0.1:0")

    def test_unix(self) -> None:
        self.migrate(f"unix:{self.folder}/migration")


if __name__ == "__main__":
    unittest.main()
