"""The avocado suite on real QEMU, run by avocado itself: its results and its files."""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).parents[1] / "avocado_suite"
DOCS = Path(__file__).parents[2] / "docs"


@dataclass
class Job:
    """An avocado run: its exit code, its results of each test, and its output."""

    exit_code: int
    tests: list[dict[str, Any]]
    output: str

    def by_name(self) -> dict[str, int]:
        """Return the index of each test by its name, without the variant that avocado appends."""
        return {test["name"].partition(";")[0]: index for index, test in enumerate(self.tests)}

    def files(self, test: int = 0) -> Path:
        """Return the output folder of a test."""
        return Path(self.tests[test]["logdir"]) / "data"

    def log(self, test: int = 0) -> str:
        """Return the log of a test."""
        return Path(self.tests[test]["logfile"]).read_text()


@dataclass
class Avocado:
    """Runs tests of the suite with a temporary folder of their own."""

    scratch: Path
    results: Path

    def run(self, test: str | Path, *options: str, config: str = "", **environment: str) -> Job:
        """Run the file `test`, with `config` in avocado's configuration."""
        (self.scratch / "avocado.conf").write_text(config)
        command = [sys.executable, "-m", "avocado", "--config", str(self.scratch / "avocado.conf")]
        command += ["run", str(SUITE / test), *options, "--job-results-dir", str(self.results)]
        results = self.scratch / "results.json"
        done = subprocess.run(
            [*command, "--disable-sysinfo", "--json", str(results)],
            env={**os.environ, "TMPDIR": str(self.scratch), **environment},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        output = done.stdout + done.stderr
        assert results.exists(), f"avocado's run ended before its tests:\n{output}"
        tests = json.loads(results.read_text())["tests"]
        results.unlink()
        return Job(done.returncode, tests, output)


@pytest.fixture
def avocado(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Avocado:
    """avocado; without it, the test is skipped."""
    if importlib.util.find_spec("avocado") is None:
        if os.environ.get("DMAPROOF_NO_SKIP") == "1":
            pytest.fail("avocado is not installed: pip install 'dmaproof[avocado]'")
        pytest.skip("avocado is not installed: pip install 'dmaproof[avocado]'")
    monkeypatch.delenv("DMAPROOF_NO_SKIP", raising=False)
    return Avocado(tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("results"))


def no_runs_left(avocado: Avocado) -> bool:
    return not [*avocado.scratch.glob("dmaproof-*"), *avocado.scratch.glob(".dmaproof-*")]


def test_a_pass_and_its_files(avocado: Avocado) -> None:
    job = avocado.run("disk.py", "-p", "guest=bare", "-p", "seed=1")
    assert [test["status"] for test in job.tests] == ["PASS"], job.log()
    assert job.exit_code == 0
    assert json.loads((job.files() / "proof.json").read_text())["exit_code"] == 0
    names = {file.name for file in job.files().iterdir()}
    assert names >= {"ram.json", "ram.html", "proof.html", "source-qemu.log", "device.log"}
    assert "all pages are equal" in job.log()
    assert no_runs_left(avocado)


def test_an_injected_fault_fails_with_the_story_of_each_page(avocado: Avocado) -> None:
    job = avocado.run("disk.py", "-p", "guest=bare", "-p", "fault=drop-pages=0.01")
    assert [test["status"] for test in job.tests] == ["FAIL"]
    assert job.exit_code == 1
    assert "pages were lost" in job.tests[0]["fail_reason"]
    story = (
        r"GPA 0x[0-9a-f]+: \d+ bytes differ; last device write: .* of request \d+ on queue \d .*, "
        r"lost at the dirty log"
    )
    assert re.search(story, job.log())
    assert no_runs_left(avocado)


def test_three_added_lines_check_the_ram_of_an_existing_test(avocado: Avocado) -> None:
    assert (SUITE / "existing_migration.py").read_text().count("# added\n") == 3
    job = avocado.run("existing_migration.py")
    assert [test["status"] for test in job.tests] == ["PASS"], job.log()
    job = avocado.run("existing_migration.py", "-p", "spoil=0x2345000")
    assert [test["status"] for test in job.tests] == ["FAIL"]
    assert "GPA 0x2345000" in job.log()
    (difference,) = json.loads((job.files() / "ram.json").read_text())["differences"]
    assert difference["gpa"] == 0x2345000


def test_the_docs_show_the_three_lines_as_they_are() -> None:
    shown = (DOCS / "avocado.md").read_text()
    for line in (SUITE / "existing_migration.py").read_text().splitlines():
        assert not line.endswith("# added") or line in shown
    assert (SUITE / "matrix.yaml").read_text().split("\n", 1)[1] in shown


def test_a_varianter_file_makes_a_matrix(avocado: Avocado) -> None:
    options = ("-m", str(SUITE / "matrix.yaml"), "--max-parallel-tasks", "1")
    job = avocado.run("disk.py", *options)
    assert [test["status"] for test in job.tests] == ["PASS"] * 4
    setups = [json.loads((job.files(i) / "proof.json").read_text())["setup"] for i in range(4)]
    trackers, harvests = ("iommu", "address-queue"), ("0.05", "final")
    assert {(setup["tracker"], setup["harvest"]) for setup in setups} == {
        *product(trackers, harvests)
    }


def test_a_missing_prerequisite_cancels_with_its_remedy(avocado: Avocado) -> None:
    empty = {"PATH": "/nowhere", "XDG_DATA_HOME": "/nowhere"}
    job = avocado.run("disk.py", "-p", "guest=bare", **empty)
    assert [test["status"] for test in job.tests] == ["CANCEL"]
    assert "qemu-system-x86" in job.log()
    job = avocado.run("disk.py", "-p", "guest=bare", **empty, DMAPROOF_NO_SKIP="1")
    assert [test["status"] for test in job.tests] == ["ERROR"]
    assert "qemu-system-x86" in job.tests[0]["fail_reason"]
    assert no_runs_left(avocado)


def test_a_wrong_parameter_is_an_error(avocado: Avocado) -> None:
    job = avocado.run("disk.py", "-p", "tracker=none-such")
    assert [test["status"] for test in job.tests] == ["ERROR"]
    assert "none-such" in job.tests[0]["fail_reason"]


def output_of_avocado(*words: str) -> str:
    command = [sys.executable, "-m", "avocado", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=True).stdout


def test_avocado_finds_the_plugins_and_the_cells(avocado: Avocado) -> None:
    named = [
        line for line in output_of_avocado("plugins").splitlines() if line.startswith("dmaproof ")
    ]
    assert [line.split()[1:3] for line in named] == [["Runner", "for"], ["Test", "resolver"]]
    listed = output_of_avocado("list", str(SUITE / "proof.toml")).splitlines()
    cells = [
        "scenario=unix fault=none",
        "scenario=multifd-4 fault=none",
        "scenario=multifd-4 fault=drop-pages=0.01",
    ]
    assert listed == [f"dmaproof {cell}" for cell in cells]
    chosen = output_of_avocado("list", f"{SUITE / 'proof.toml'}:drop").splitlines()
    assert chosen == [f"dmaproof {cells[2]}"]


def test_an_injected_fault_fails_only_its_cell(avocado: Avocado) -> None:
    job = avocado.run("proof.toml", "-p", "tracker=dirty-ring", "--max-parallel-tasks", "1")
    tests = job.by_name()
    broken = tests.pop("scenario=multifd-4 fault=drop-pages=0.01")
    assert job.exit_code == 1
    assert {job.tests[index]["status"] for index in tests.values()} == {"PASS"}, job.log()
    assert job.tests[broken]["status"] == "FAIL"
    assert "pages were lost" in job.tests[broken]["fail_reason"]
    report = json.loads((job.files(broken).parent / "proof.json").read_text())
    assert report["setup"]["tracker"] == "dirty-ring"
    log = job.log(broken)
    assert report["lost_pages"]
    assert all(page["story"] in log for page in report["lost_pages"])
    assert "lost at the dirty log" in log
    assert "lost at" not in job.log(tests["scenario=unix fault=none"])
    assert no_runs_left(avocado)


def test_a_recipe_distinguishes_a_skip_from_an_error(avocado: Avocado, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    # The guest gives up, as its buffer does not fit into 64 MiB.
    axes = ["--machine=q35,toaster", "--memory=64M", "--workload=hot=100000"]
    axes += ["--guest=bare", "--accel=tcg"]
    command = [sys.executable, "-m", "qmp_tools.cli", "matrix", *axes, f"--avocado={recipe}"]
    subprocess.run(command, check=True, timeout=900)
    job = avocado.run(recipe)
    tests = job.by_name()
    full, toaster = (job.tests[tests[f"machine={name}"]] for name in ("q35", "toaster"))
    assert (full["status"], toaster["status"]) == ("ERROR", "SKIP")
    assert "pages, but only" in full["fail_reason"]
    assert "does not have this machine type" in toaster["fail_reason"]
    assert no_runs_left(avocado)


def test_wrong_usage_is_an_error_with_its_message(avocado: Avocado) -> None:
    job = avocado.run("proof.toml:unix", "-p", "tracker=none-such")
    assert [test["status"] for test in job.tests] == ["ERROR"]
    assert "--tracker: expected one of address-queue" in job.tests[0]["fail_reason"]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """A slot of avocado's remote spawner: this machine over ssh, with keys made for the test."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or importlib.util.find_spec("avocado_spawner_remote") is None:
        pytest.skip(
            "apt-get install openssh-server; pip install avocado-framework-plugin-spawner-remote"
        )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # elsewhere the service of sshd makes it
    for name in ("host", "key"):
        file = str(tmp_path / name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "key.pub",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "yes",
        "PidFile": "none",
    }
    config = tmp_path / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    log = tmp_path / "sshd.log"
    server = subprocess.Popen([sshd, "-D", "-E", log, "-f", config])
    slot = {
        "client": "ssh",
        "host": "127.0.0.1",
        "port": port,
        "username": getpass.getuser(),
        "password": "",
        "prompt": "[#$] *$",
        "identity_file": str(tmp_path / "key"),
        "timeout": 120,  # for each step of the login
    }
    (tmp_path / "slot.json").write_text(json.dumps(slot))
    try:
        while not (log.exists() and "Server listening" in log.read_text()):
            assert server.poll() is None, f"sshd ended with {server.returncode}"
            time.sleep(0.05)
        yield tmp_path / "slot.json"
    finally:
        server.terminate()
        server.wait()


def test_a_remote_host_carries_a_cell_out(avocado: Avocado, host: Path) -> None:
    programs = Path(sys.executable).parent  # the spawner finds its own helper only by PATH
    config = (
        f"[spawner.remote]\nslots = ['{host}']\n"
        f"setup_hook = export PATH={programs}:$PATH TMPDIR={avocado.scratch}\n"
    )
    options = ("--spawner", "remote", "--max-parallel-tasks", "1")
    path = f"{programs}:{os.environ['PATH']}"
    job = avocado.run("proof.toml:drop", *options, config=config, PATH=path)
    assert [test["status"] for test in job.tests] == ["FAIL"], (
        job.output + (host.parent / "sshd.log").read_text()
    )
    assert "lost at the dirty log" in job.log()
    assert json.loads((job.files().parent / "proof.json").read_text())["exit_code"] == 1
    assert no_runs_left(avocado)
