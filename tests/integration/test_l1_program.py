"""The programs that run in L1 import only packages that L1 has."""

from __future__ import annotations

import subprocess
import sys


def test_the_programs_in_l1_need_no_optional_package() -> None:
    script = (
        "import sys\n"
        "for name in ('rich', 'jinja2', 'packaging', 'jsonschema', 'matplotlib', 'pytest',\n"
        "             'avocado'):\n"
        "    sys.modules[name] = None\n"
        "import qmp_tools.passthrough.inside, qmp_tools.passthrough.nested_proof\n"
        "import qmp_tools.passthrough.vhost_device\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
