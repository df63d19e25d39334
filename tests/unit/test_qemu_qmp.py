"""The search for the library qemu.qmp."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.qemu import qemu_qmp


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
