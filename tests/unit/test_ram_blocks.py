"""QEMU's RAM blocks as its monitor prints them, and those in which TCG may lose pages."""

from __future__ import annotations

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.memory.ram_blocks import RamBlock, block_of, known_tcg_loss, parse_ram_blocks

MIB = 1 << 20
OLD = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000002000000 0x0000000004000000 0x0000000004000000
                            4 KiB  0x0000000000000000 0x0000000002000000 0x0000000002000000
   0000:00:01.0/vga.vram    2 MiB  0x0000000006080000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x00000000070c0000 0x0000000000020000 0x0000000000200000
"""
NEW = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                    ram0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f1251dff000  rw
                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000 0x00007f129c800000  ro
"""  # noqa: E501


def test_the_blocks_of_an_old_qemu_are_read() -> None:
    assert parse_ram_blocks(OLD.replace("\n", "\r\n")) == [
        RamBlock("", 0, 32 * MIB),
        RamBlock("ram0", 32 * MIB, 64 * MIB),
        RamBlock("0000:00:01.0/vga.vram", 0x6080000, 16 * MIB),
        RamBlock("/rom@etc/acpi/tables", 0x70C0000, 128 * 1024),
    ]


def test_the_blocks_of_a_new_qemu_are_read() -> None:
    assert parse_ram_blocks(NEW) == [
        RamBlock("ram0", 0, 64 * MIB),
        RamBlock("pc.bios", 64 * MIB, 256 * 1024),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unknown command: 'info ramblock'\n",
        OLD + "more\n",
        OLD.replace("Used", "Size"),
        NEW[1:-4],
    ],
)
def test_a_text_that_is_not_a_table_of_blocks_is_refused(text: str) -> None:
    with pytest.raises(UntestableError, match="info ramblock"):
        parse_ram_blocks(text)


def test_a_region_is_the_block_of_its_name() -> None:
    blocks = parse_ram_blocks(OLD)
    assert block_of("ram0", blocks) == blocks[1]
    assert block_of("vga.vram", blocks) == blocks[2]
    assert block_of("/rom@etc/acpi/tables", blocks) == blocks[3]
    assert block_of("am0", blocks) is None
    twice = [*blocks, RamBlock("0000:00:02.0/vga.vram", 0x9000000, MIB)]
    assert block_of("vga.vram", twice) is None, "either of them"


@pytest.mark.parametrize(
    ("version", "offset", "used_bytes", "why"),
    [
        ("7.2.22 Debian 1:1.0", 0, 64 * MIB, "its size, 65536 KiB, is a multiple of 256 KiB"),
        ("8.2.22 Debian 1:1.0", MIB, 64 * MIB, "its size, 65536 KiB, is a multiple of 256 KiB"),
        ("7.2.22 Debian 1:1.0", 0, 64 * MIB + 8192, None),
        ("7.2.22 Debian 1:1.0", MIB, 64 * MIB + 8192, None),
        ("9.0.22 Debian 1:1.0", 0, 64 * MIB, None),
        (
            "9.0.22 Debian 1:1.0",
            MIB,
            64 * MIB,
            "and it is not the first RAM block ('info ramblock')",
        ),
        ("11.1.22 Debian 1:1.0", MIB, 64 * MIB, "not the first RAM block"),
        ("11.1.22 Debian 1:1.0", MIB, 64 * MIB + 8192, None),
        ("11.2.22 Debian 1:1.0", MIB, 64 * MIB, None),
    ],
)
def test_only_the_rule_that_applies_is_given_as_the_cause(
    version: str, offset: int, used_bytes: int, why: str | None
) -> None:
    found = known_tcg_loss(RamBlock("ram0", offset, used_bytes), version)
    assert found is None if why is None else why in str(found)
