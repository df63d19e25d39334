"""Make X.509 certificates for one migration under TLS, with the ``openssl`` command.

Each run has its own certificate authority, which signs one certificate for each side. The files
have the names that QEMU's tls-creds-x509 looks for in its folder.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, WaitTimeoutError

from ..host.captured import run_captured
from ..host.timeout import DEFAULT_TIMEOUT_S

SERVER_NAME: Final = "destination.dmaproof.test"
"""The name in the destination's certificate. It resolves to no address, so QEMU's tls-hostname
must be set to it."""

# The system's configuration adds other extensions, so it is not used.
_CONFIGURATION: Final = "[req]\ndistinguished_name = name\n[name]\n"
_AUTHORITY: Final = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
# QEMU checks the key purposes (qcrypto_tls_creds_check_cert_key_purpose).
_EACH_SIDE: Final = ("basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature")


async def make_certificates(folder: Path) -> None:
    """Write ca-cert.pem and ``{client,server}-{cert,key}.pem`` into `folder`.

    Raises:
        UntestableError: OpenSSL 3 or later is not installed, or it fails.
    """
    (folder / "openssl.cnf").write_text(_CONFIGURATION)
    await asyncio.to_thread(_make_all, folder)


def _make_all(folder: Path) -> None:
    _make(folder, "ca", "dmaproof", _AUTHORITY)
    signed = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem")
    _make(folder, "client", "source", (*_EACH_SIDE, "extendedKeyUsage=clientAuth"), *signed)
    server = ("extendedKeyUsage=serverAuth", f"subjectAltName=DNS:{SERVER_NAME}")
    _make(folder, "server", "destination", (*_EACH_SIDE, *server), *signed)


def _make(folder: Path, file: str, name: str, extensions: tuple[str, ...], *signed: str) -> None:
    command = [
        *(
            "openssl",
            "req",
            "-x509",
            "-config",
            "openssl.cnf",
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
        ),
        *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"),
        *("-keyout", f"{file}-key.pem", "-out", f"{file}-cert.pem"),
        *(option for extension in extensions for option in ("-addext", extension)),
        *signed,
    ]
    try:
        done = run_captured(command, timeout_s=DEFAULT_TIMEOUT_S, cwd=folder)
    except FileNotFoundError:
        raise UntestableError(
            "TLS needs the openssl command: install the package openssl"
        ) from None
    except subprocess.TimeoutExpired as error:
        raise WaitTimeoutError(
            f"the openssl command did not end within {DEFAULT_TIMEOUT_S:g} s; try again when the "
            "host is less busy"
        ) from error
    if done.returncode:
        raise UntestableError(
            f"openssl failed to make the {file} certificate; dmaproof needs OpenSSL 3 or later: "
            f"{done.stderr}"
        )
