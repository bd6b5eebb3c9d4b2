"""Apply each mutation of this folder to a copy of the tree, and see whether the default tests catch it.

Each ``*.patch`` holds one small error: a sign, a dropped weight, a skipped restore, an off-by-one. For each patch, the
tests of the mirrored wing run first and stop at the first failure; if they pass, the rest of the default tests run.
The default tests must pass without a mutation first. Results go to a file after each patch. A later call skips the
patches in this file, unless the patch or the tree has changed.

    python tests/mutations/run.py                    # all patches
    python tests/mutations/run.py --only 07 12       # these two
    python tests/mutations/run.py --again            # forget earlier results

The exit status is 1 if a mutation survives or a patch no longer applies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = ("src", "tests", "docs", "benchmarks", "pyproject.toml", "setup.cfg", "README.rst", "CONTRIBUTING.rst", ".ci")


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def tree_digest() -> str:
    """Return a digest of all sources and tests, mutations left out."""
    files = sorted(
        path for name in ("src", "tests") for path in (ROOT / name).rglob("*.py") if HERE not in path.parents
    )
    return digest(*(path.read_bytes() for path in files))


def wing_of(patch: Path) -> str:
    """Return the wing of the file that a patch changes."""
    [line] = [line for line in patch.read_text().splitlines() if line.startswith("+++ ")]
    return line.split("src/curvop/")[1].split("/")[0]


def pytest(folder: Path, paths: list[str], timeout: float) -> tuple[str, str]:
    """Run tests in a copy; return 'passed', 'failed' or 'timed out', and the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    env = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "timed out", ""
    if run.returncode == 0:
        return "passed", ""
    if run.returncode not in (1, 2):  # 2: a module that cannot be imported any more
        raise RuntimeError(f"pytest ended with status {run.returncode}: {run.stdout[-500:]}{run.stderr[-500:]}")
    failures = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "failed", failures[0] if failures else run.stdout[-300:]


def verdict(patch: Path, timeout: float) -> dict[str, Any]:
    """Return what the default tests make of one mutation."""
    began, wing = time.monotonic(), wing_of(patch)
    ignored = shutil.ignore_patterns("__pycache__", "_build", "gallery")
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=ignored)
            else:
                shutil.copy(source, folder / part)
        applied = subprocess.run(["patch", "-p1", "--fuzz=0", "-s", "-f", "-i", str(patch)], cwd=folder)
        if applied.returncode:
            return {"verdict": "no longer applies", "by": "", "seconds": 0}
        first = [f"tests/{wing}", f"src/curvop/{wing}"]
        result, by = pytest(folder, first, timeout)
        if result == "passed":
            others = [f"--ignore={path}" for path in first]
            result, by = pytest(folder, ["tests", "src", *others], timeout)
    names = {"passed": "survived", "failed": "caught", "timed out": "caught by the time limit"}
    return {"verdict": names[result], "by": by, "seconds": round(time.monotonic() - began)}


def main() -> int:
    """Run the mutations; print a line for each and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NUMBER", help="numbers of patches, such as 07")
    parser.add_argument("--again", action="store_true", help="run all, whatever earlier runs found")
    parser.add_argument("--skip-baseline", action="store_true", help="do not run the default tests without a mutation")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each run of pytest (default: 900)")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="file of the results")
    options = parser.parse_args()
    patches = [path for path in sorted(HERE.glob("*.patch")) if not options.only or path.name[:2] in options.only]
    known = {} if options.again or not options.results.exists() else json.loads(options.results.read_text())
    tree = tree_digest()
    if not options.skip_baseline and known.get("baseline") != tree:
        if pytest(ROOT, ["tests", "src"], options.timeout)[0] != "passed":
            print("the default tests fail without any mutation")
            return 1
        known["baseline"] = tree
    for patch in patches:
        key = digest(patch.read_bytes(), tree.encode())
        if known.get(patch.stem, {}).get("key") != key:
            known[patch.stem] = verdict(patch, options.timeout) | {"key": key}
            temporary = options.results.with_suffix(".tmp")
            temporary.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
            temporary.replace(options.results)
        result = known[patch.stem]
        print(f"{patch.stem:45} {result['verdict']:25} {result['seconds']:5} s  {result['by'][:100]}", flush=True)
    results = [known[patch.stem]["verdict"] for patch in patches]
    caught = sum(result.startswith("caught") for result in results)
    print(f"{caught} of {len(results)} mutations caught, {results.count('no longer applies')} no longer apply")
    return int(caught < len(results))


if __name__ == "__main__":
    sys.exit(main())
