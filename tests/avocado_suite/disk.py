"""A disk outside QEMU writes guest RAM during a migration."""

from qmp_tools.integrations.avocado import MigrationTest


class Disk(MigrationTest):
    """Takes the parameters of `qmp_tools.integrations.avocado.PARAMETERS`.

    :avocado: enable
    :avocado: tags=migration,dma
    """

    def test_survives(self) -> None:
        self.migrate()
        self.assert_ram_equal()
        self.assert_dma_survived()
