"""The certificates of a migration over TLS, as openssl judges them."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

from qmp_tools.migration.certificates import SERVER_NAME, make_certificates


def test_certificates_are_valid_for_their_side_only(tmp_path: Path) -> None:
    asyncio.run(make_certificates(tmp_path))

    def verify(side: str, *options: str) -> bool:
        command = ["openssl", "verify", "-CAfile", "ca-cert.pem", *options, f"{side}-cert.pem"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0

    assert verify("server", "-purpose", "sslserver", "-verify_hostname", SERVER_NAME)
    assert not verify("server", "-verify_hostname", "elsewhere.test")
    assert not verify("server", "-purpose", "sslclient")
    assert verify("client", "-purpose", "sslclient")
    assert not verify("client", "-purpose", "sslserver")
