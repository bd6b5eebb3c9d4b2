"""The blocks of code on a page of documentation, in their order."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
_OPENING = re.compile(r"^(?:\.\. code-block:: (?P<language>\S+)|(?P<text>(?!\.\. ).*)::)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A literal block.

    Attributes
    ----------
    language : str
        What ``code-block`` says, 'bash' after a ``::``.
    code : str
    line : int
        Of the page, the number of the first line of code.
    """

    language: str
    code: str
    line: int


def blocks(path: Path) -> list[Block]:
    """Return the literal blocks of a page."""
    lines = path.read_text().splitlines()
    found, index = [], 0
    while index < len(lines):
        opening = _OPENING.match(lines[index])
        index += 1
        if not opening:
            continue
        assert not lines[index], f"{path.name}:{index + 1}: a block begins after an empty line"
        start = index = index + 1
        while index < len(lines) and (not lines[index] or lines[index].startswith("    ")):
            index += 1
        code = textwrap.dedent("\n".join(lines[start:index])).strip("\n") + "\n"
        found.append(Block(opening["language"] or "bash", code, start + 1))
    return found
