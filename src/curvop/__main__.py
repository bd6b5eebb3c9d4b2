# PYTHON_ARGCOMPLETE_OK
"""Run the command ``curvop`` as ``python -m curvop``."""

import sys
from pathlib import Path

from curvop.cli.main import main

if __name__ == "__main__":
    sys.exit(main(prog=f"{Path(sys.executable).name} -m curvop"))
