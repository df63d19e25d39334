"""``python -m qmp_tools.cli``: the ``dmaproof`` command."""

import sys

from .main import main

sys.exit(main())
