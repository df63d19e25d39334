"""The search for the library qemu.qmp, and its failures."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.qemu import qemu_qmp
from qmp_tools.qemu.qmp import Qmp, QmpError


def test_qemu_qmp_is_found_after_folders_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = qemu_qmp.folder()
    (tmp_path / "qemu" / "qmp").mkdir(parents=True)
    (tmp_path / "qemu" / "__init__.py").touch()
    (tmp_path / "qemu" / "qmp" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert qemu_qmp.folder() == found


def test_a_missing_qemu_qmp_is_reported_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UntestableError, match=r"pip install qemu\.qmp"):
        qemu_qmp.folder()


def test_qemu_qmp_is_loaded_without_taking_the_name_qemu() -> None:
    library = qemu_qmp.QMPClient.__module__
    assert library.startswith("qmp_tools.qemu.qemu_qmp.")
    with pytest.raises(AttributeError, match="no attribute 'Pigeon'"):
        qemu_qmp.Pigeon  # noqa: B018


def test_a_session_that_ends_at_its_beginning_is_a_qmp_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """qemu.qmp asserts after the negotiation that the session runs."""

    class Client:
        def __init__(self, name: str) -> None:
            self.is_connected = True

        async def connect(self, address: object) -> None:
            raise AssertionError

        async def disconnect(self) -> None:
            self.is_connected = False

    monkeypatch.setattr("qmp_tools.qemu.qmp.qemu_qmp.QMPClient", Client, raising=False)
    qmp = Qmp("source QEMU", 5)
    with pytest.raises(QmpError, match="source QEMU did not answer on QMP"):
        asyncio.run(qmp.connect("/run/qmp"))
