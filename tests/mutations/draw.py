"""Draw mutations at covered lines of all wings, and write them as patches.

    python -m coverage run -m pytest && python -m coverage json -o coverage.json
    python tests/mutations/draw.py coverage.json --seed 18

Candidates are the expressions and statements below that lie on lines which the default tests execute. Each wing has its
share of the draws. A drawn mutation that cannot change any result (an equivalent one) is replaced by hand: delete its
patch, note it in ``equivalent.txt``, and draw again with ``--skip``, which takes the next draw of its wing instead.

The patches from number 41 on are written by hand: they change the formulas and the checks of KFAC and EKFAC.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: Mutations drawn in each wing, 40 in all.
DRAWS = {
    "kernels": 16,
    "operators": 6,
    "storage": 4,
    "spectrum": 5,
    "solvers": 2,
    "distributed": 2,
    "testing": 1,
    "checks": 2,
    "cli": 2,
}

ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Pow: "*"}
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
TESTS = {ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}


class Source:
    """The text of a file, in which one node can be replaced."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text()
        self._starts = [0]
        for line in self.text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line.encode()))

    def of(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.text, node) or ""

    def replaced(self, node: ast.AST, new: str) -> str:
        raw = self.text.encode()
        begin = self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return (raw[:begin] + new.encode() + raw[end:]).decode()


def mutations(source: Source, covered: set[int]) -> Iterator[tuple[str, int, str]]:
    """Yield ``(kind, line, text of the mutated file)``."""
    tree = ast.parse(source.text)
    annotations: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            annotations |= set(ast.walk(node.annotation))
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            annotations |= set(ast.walk(node.returns))
        if isinstance(node, ast.JoinedStr | ast.Raise):  # texts of messages have tests of their own
            annotations |= set(ast.walk(node))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if line not in covered or node in annotations:
            continue
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            left, right = source.of(node.left), source.of(node.right)
            yield "arithmetic", line, source.replaced(node, f"({left}) {ARITHMETIC[type(node.op)]} ({right})")
            if isinstance(node.op, ast.Mult | ast.Div | ast.Add | ast.Sub):
                yield "dropped operand", line, source.replaced(node, f"({left})")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            new = (COMPARISONS | TESTS).get(type(node.ops[0]))
            if new:
                text = f"{source.of(node.left)} {new} {source.of(node.comparators[0])}"
                yield "comparison", line, source.replaced(node, text)
        elif isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            yield "and/or", line, source.replaced(node, word.join(f"({source.of(value)})" for value in node.values))
        elif isinstance(node, ast.UnaryOp):
            yield "sign", line, source.replaced(node, f"({source.of(node.operand)})")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value not in (-1,):
            yield (
                "constant",
                line,
                source.replaced(
                    node, repr(node.value + 1 if type(node.value) is int or not node.value else node.value * 2)
                ),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield "flag", line, source.replaced(node, repr(not node.value))
        elif isinstance(node, ast.If):
            yield "condition", line, source.replaced(node.test, f"not ({source.of(node.test)})")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield "skipped call", line, source.replaced(node, "pass")
        elif isinstance(node, ast.AugAssign):
            yield "skipped update", line, source.replaced(node, "pass")
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.BinOp):
            yield "returned sign", line, source.replaced(node.value, f"-({source.of(node.value)})")


def draws(wing: str, lines: dict[str, list[int]], seed: int) -> Iterator[tuple[str, Path, int, str]]:
    """Yield the mutations of a wing in random order, no two on one line."""
    found = []
    for path in sorted((ROOT / "src" / "curvop" / wing).glob("*.py")):
        covered = set(lines.get(str(path.relative_to(ROOT)), []))
        found += [(kind, path, line, text) for kind, line, text in mutations(Source(path), covered)]
    random.Random(f"{seed} {wing}").shuffle(found)
    seen: set[tuple[Path, int]] = set()
    for kind, path, line, text in found:
        try:
            ast.parse(text)
        except SyntaxError:
            continue
        if (path, line) not in seen:
            seen.add((path, line))
            yield kind, path, line, text


def main() -> None:
    """Write the patches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coverage", type=Path, help="what 'coverage json' has written")
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--skip", default="", help="draws to pass over, such as kernels:3,cli:1, counted from 0")
    options = parser.parse_args()
    data = json.loads(options.coverage.read_text())["files"]
    lines = {name: entry["executed_lines"] for name, entry in data.items()}
    skipped = {
        (wing, int(index)) for wing, _, index in (word.partition(":") for word in options.skip.split(",") if word)
    }
    number = 0
    for wing, count in DRAWS.items():
        chosen = ((index, draw) for index, draw in enumerate(draws(wing, lines, options.seed)))
        kept = (draw for index, draw in chosen if (wing, index) not in skipped)
        for _, (kind, path, line, text) in zip(range(count), kept, strict=False):
            number += 1
            name = path.relative_to(ROOT)
            old = path.read_text().splitlines(keepends=True)
            patch = difflib.unified_diff(old, text.splitlines(keepends=True), f"a/{name}", f"b/{name}")
            target = HERE / f"{number:02}-{wing}-{path.stem}-{line}.patch"
            target.write_text(f"{kind}\n\n" + "".join(patch))
            print(target.name, kind)


if __name__ == "__main__":
    main()
