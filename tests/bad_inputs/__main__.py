"""Print the page of the documentation that lists all bad inputs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bad_inputs import table

if __name__ == "__main__":
    print(table(), end="")
