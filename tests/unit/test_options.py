"""The options of a proof: their one description, and all that is derived from it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mypy.api
import pytest

from dmaproof.errors import UsageError
from qmp_tools.cli.options import add_options, given_options
from qmp_tools.proof.options import OPTIONS, ProofOptions, options_as_keywords

CHOSEN = ProofOptions(
    qemu=Path("/usr/bin/qemu"),
    memory="1G",
    guest="bare",
    workload="threads=4",
    scenario="tls",
    capability=["auto-converge", "return-path"],
    parameter='multifd-channels=4 tls-authz="7"',
    bandwidth="64M",
    max_downtime=2,
    device=["blk", "net:mtu=9000"],
    harvest="immediate",
    destination_lacks="flush mq",
    kill_device=True,
    kill_destination_device=True,
    seed=0,
)


@options_as_keywords(ProofOptions)
def chosen(options: ProofOptions) -> ProofOptions:
    """Return the options."""
    return options


def parsed(words: list[str]) -> ProofOptions:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return given_options(parser.parse_args(words))


def test_texts_are_converted_to_values() -> None:
    assert (CHOSEN.qemu, CHOSEN.memory, CHOSEN.bandwidth) == ("/usr/bin/qemu", 1 << 30, 64 << 20)
    assert (CHOSEN.devices, CHOSEN.destination_lacks) == (("blk", "net:mtu=9000"), ("flush", "mq"))
    assert ProofOptions(harvest=1).harvest == 1.0


def test_the_words_of_a_command_line_result_in_the_same_options() -> None:
    assert parsed(CHOSEN.words()) == CHOSEN
    assert parsed([]) == ProofOptions()
    assert ProofOptions().words() == []
    assert "--seed=0" in CHOSEN.words()


def test_json_and_texts_by_name_result_in_the_same_options() -> None:
    assert ProofOptions.of(json.loads(json.dumps(CHOSEN.to_json()))) == CHOSEN
    texts = {"kill_device": "on", "max_downtime": "2", "device": "blk net:mtu=9000"}
    assert ProofOptions.of({**CHOSEN.changed, **texts}) == CHOSEN
    assert ProofOptions.of({"qemu": None, "cpus": None}) == ProofOptions()


def test_keywords_and_an_object_result_in_the_same_options() -> None:
    assert chosen(guest="bare", memory="1G") == chosen(ProofOptions(guest="bare", memory=1 << 30))
    with pytest.raises(UsageError, match="either ProofOptions or keywords"):
        chosen(ProofOptions(), guest="bare")  # type: ignore[call-overload]


def test_an_option_that_was_not_given_has_its_default() -> None:
    parser = argparse.ArgumentParser()
    defaults = ProofOptions(guest="bare", cpus=3)
    add_options(parser, defaults=defaults)
    options = given_options(parser.parse_args(["--guest=linux"]), defaults)
    assert options == ProofOptions(cpus=3)
    assert "(default: bare)" in parser.format_help()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gest": "bare"}, "gest is not an option of a proof; expected one of arch, "),
        ({"guest": "horse"}, "--guest: expected one of bare, linux, got 'horse'"),
        ({"guest": 5}, "--guest: expected a string, got 5"),
        ({"cpus": 0}, "--cpus: expected a whole number from 1 on, got 0"),
        ({"cpus": "two"}, "--cpus: expected a whole number from 1 on, got 'two'"),
        ({"seed": 1.5}, "--seed: expected a whole number, got 1.5"),
        ({"qemu": 7.2}, "--qemu: expected a path, got 7.2"),
        ({"bandwidth": "0M"}, "--bandwidth: expected a number of bytes"),
        ({"harvest": "often"}, "--harvest: expected seconds .*, immediate or final, got 'often'"),
        ({"max_downtime": 3600}, "--max-downtime: expected more than 0 and less than 3600"),
        ({"kill_device": "maybe"}, "--kill-device: expected on or off, got 'maybe'"),
        ({"device": 5}, "--device: expected a name, or a list of names, got 5"),
        ({"destination_lacks": ["flush", "x"]}, "--destination-lacks: expected one of seg-max"),
    ],
)
def test_the_error_about_a_wrong_value_names_the_option(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ProofOptions.of(options)


def test_the_default_of_every_option_is_a_possible_value() -> None:
    for option in OPTIONS.values():
        if option.default is not None:
            assert option.value_of(option.default) == option.default


def test_a_type_checker_knows_the_options(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(
        "from qmp_tools import prove\n"
        'prove(guest="bare", tracker="dirty-ring")\n'
        'prove(gest="bare")\n'
        "prove(cpus=[])\n"
    )
    text, _, code = mypy.api.run(["--strict", f"--cache-dir={tmp_path}", str(file)])
    lines = [line for line in text.splitlines() if "user.py" in line and "error:" in line]
    assert code == 1
    assert [line.split(":")[1] for line in lines] == ["3", "4"], text
    assert '"gest"' in lines[0]
