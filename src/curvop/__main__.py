"""Run the command ``curvop`` as ``python -m curvop``."""

import sys

from curvop.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
