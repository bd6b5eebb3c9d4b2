"""Soak: products, blocks, submatrices and studies in random order for half an hour, with faults in the user's code.

Run ``OMP_NUM_THREADS=1 python benchmarks/soak.py``; it writes ``benchmarks/results/soak.json``, and exits with 1 where
anything was wrong, or memory grew by more than `GROWTH` in the second half. Each result is compared with a dense matrix
in float64 by `torch.func`. Faults are what a user's own model, loader, parameters and files do: they raise, are
interrupted, hold NaN, draw random numbers, are written to, are cut off. Under one, an operation is to raise it, refuse,
or be right; after it, the same operator is to be right again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from scipy.sparse.linalg import aslinearoperator
from sklearn.datasets import load_digits
from soak_cases import INJECTED, MATRICES, Case, Fault, World, modules, references

import curvop
from curvop.spectrum import blocks, density, eigsh

RESULTS = Path(__file__).resolve().parent / "results" / "soak.json"
EXAMPLES = 40
REFUSALS = (curvop.NonFiniteProductError, curvop.NonDeterministicObjectiveError, ValueError)
LIMITS = {"float64": 1e-10, "float32": 2e-4}  # of what an error is measured by, the norm of the matrix and the vector
GROWTH = 1.0  # MiB in 1,000 operations; a leak of one vector or batch in each of them is more
LONG = ("solve", "eigsh", "density", "blocks", "journal", "check")


class RefusedError(Exception):
    """A check found something wrong."""


def off(actual: Any, dense: np.ndarray, x: Any) -> float:
    error = np.linalg.norm(np.asarray(actual, dtype=np.float64) - dense @ x)
    found = error / (np.linalg.norm(dense) * np.linalg.norm(x))
    return float(found) if np.isfinite(found) else np.inf


class _Operations:
    """Each returns how far off it was, relative to the norms of matrix and vector."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.torn = 0

    def vectors(self, case: Case, size: int, *columns: int) -> np.ndarray:
        return self.rng.standard_normal((size, *columns)).astype(case.A.dtype)

    def product(self, case: Case, A: Any, dense: np.ndarray, *columns: int) -> float:
        x = self.vectors(case, dense.shape[1], *columns)
        return off(A @ x, dense, x)

    def matvec(self, case: Case) -> float:
        return self.product(case, case.A, case.dense)

    def matmat(self, case: Case) -> float:
        return self.product(case, case.A, case.dense, int(self.rng.integers(1, 8)))

    def adjoint(self, case: Case) -> float:
        return self.product(case, case.A.H, case.dense.T, 2)

    def tensors(self, case: Case) -> float:
        x = self.vectors(case, case.A.shape[1], 3)
        return off((case.A @ torch.from_numpy(x)).numpy(), case.dense, x)

    def block(self, case: Case) -> float:
        slices = case.A.params_slices
        names = list(self.rng.choice(list(slices), int(self.rng.integers(1, 4)), replace=False))
        where = np.concatenate([np.arange(slices[name].start, slices[name].stop) for name in names])
        dense = case.dense[:, where] if case.matrix == "jacobian" else case.dense[np.ix_(where, where)]
        return self.product(case, case.A.block([str(name) for name in names]), dense)

    def submatrix(self, case: Case) -> float:
        rows, cols = (self.rng.integers(-size, size, int(self.rng.integers(1, 30))) for size in case.A.shape)
        A = case.A.submatrix(rows, cols)
        part = case.dense[np.ix_(rows, cols)]
        x = self.vectors(case, len(cols))
        return float(np.linalg.norm(A @ x - part @ x) / (np.linalg.norm(case.dense) * np.linalg.norm(x)))

    def damped(self, case: Case) -> float:
        return self.product(case, case.A.damped(0.3), case.dense + 0.3 * np.eye(len(case.dense)))

    def solve(self, case: Case) -> float:
        damping = 0.3 * float(np.linalg.norm(case.dense))
        damped = case.dense + damping * np.eye(len(case.dense))
        damping_more = max(0.0, 2 * damping - float(np.linalg.eigvalsh(damped)[0]))
        damped += damping_more * np.eye(len(damped))
        b = self.vectors(case, len(damped))
        rtol = LIMITS[case.precision] / 10
        result = curvop.solve(case.A, b, damping=damping + damping_more, rtol=rtol, progress=False)
        assert result.converged, result
        return off(result.solution, np.linalg.inv(damped), b)

    def eigsh(self, case: Case) -> float:
        k, which = int(self.rng.integers(1, 4)), str(self.rng.choice(["LA", "LM"]))
        values = np.linalg.eigvalsh(case.dense)
        result = eigsh(case.A, k, which, progress=False)
        expected = values[np.argsort(np.abs(values) if which == "LM" else values)[-k:]]
        return float(np.abs(result.values - np.sort(expected)).max() / np.abs(values).max())

    def density(self, case: Case) -> float:
        """Left after some time or by a fault, and taken up again from its checkpoint; it is told by two moments."""
        settings = {"num_probes": 2, "num_steps": 8, "rng": int(self.rng.integers(1000)), "progress": False}
        with tempfile.TemporaryDirectory() as directory:
            left = None
            try:
                density(case.A, **settings, checkpoint=directory, seconds=0.005)
            except (OSError, KeyboardInterrupt, RuntimeError) as error:
                left = error
            found = density(case.A, **settings, checkpoint=directory)
            if left is not None:
                left.__traceback__ = None
        expected = density(aslinearoperator(case.dense), **settings)
        norm = np.linalg.norm(case.dense, 2)
        return max(abs(found.moment(p).value - expected.moment(p).value) / norm**p for p in (1, 2))

    def blocks(self, case: Case) -> float:
        """Block by block, told by two moments of each."""
        seed, settings = int(self.rng.integers(1000)), {"num_probes": 2, "num_steps": 6, "progress": False}
        found = blocks(case.A, **settings, norm_products=2, rng=seed)
        seeds = np.random.default_rng(seed).integers(2**63, size=len(found.names))  # one for each block
        worst = 0.0
        for name, own, one in zip(found.names, found.densities, seeds.tolist(), strict=True):
            where = case.A.params_slices[name]
            part = case.dense[where, where]
            norm = np.linalg.norm(part, 2)
            if own.exact:
                expected = {p: float((np.linalg.eigvalsh(part) ** p).mean()) for p in (1, 2)}
            else:
                study = density(aslinearoperator(part), **settings, rng=np.random.default_rng(one))
                expected = {p: study.moment(p).value for p in (1, 2)}
            worst = max(worst, *(abs(own.moment(p).value - expected[p]) / norm**p for p in (1, 2)))
        return float(worst)

    def journal(self, case: Case) -> float:
        """Its file is cut off between two openings, at any byte of its last two records."""
        x = self.vectors(case, case.A.shape[1], 3)
        worst = 0.0
        with tempfile.TemporaryDirectory() as directory:
            for _ in range(2):
                with curvop.JournaledLinearOperator(case.A, directory) as A:
                    for column in x.T:
                        worst = max(worst, off(A @ np.ascontiguousarray(column), case.dense, column))
                    worst = max(worst, off(A @ x, case.dense, x))
                    record = A.num_bytes // 3
                self.torn += 1
                path = Path(directory) / "products.records"
                os.truncate(path, path.stat().st_size - int(self.rng.integers(2 * record)))
        return worst

    def check(self, case: Case) -> float:
        report = curvop.check(case.A)
        if not report.ok:
            raise RefusedError(str(report))
        return 0.0


class _Soak:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.operations = _Operations(self.rng)
        pixels, labels = load_digits(return_X_y=True)
        X, y = torch.from_numpy(pixels[:EXAMPLES] / 16).float(), torch.from_numpy(labels[:EXAMPLES])
        self.dense: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self.worlds = []
        for name in modules():
            points = []
            for at in range(2):
                module = modules()[name]
                points.append({key: value.detach() for key, value in module.named_parameters()})
                self.dense[name, at] = references(module, X, y)
            self.worlds += [World(name, dtype, points, X, y) for dtype in (torch.float32, torch.float64)]
        self.cases = [self.case() for _ in range(8)]
        self.counts, self.faults, self.outcomes = Counter(), Counter(), Counter()
        self.largest = dict.fromkeys(LIMITS, 0.0)
        self.wrong: list[str] = []

    def pick(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def case(self) -> Case:
        dtype, cache = self.pick(np.float32, np.float64), self.pick(0, 3e4, "auto")
        return Case(self.pick(*self.worlds), self.pick(*MATRICES), dtype, cache, self.dense)

    def compare(self, case: Case, name: str, what: str = "") -> None:
        """Carry out an operation, and see whether it was right."""
        self.counts[name] += 1
        found = getattr(self.operations, name)(case)
        self.largest[case.precision] = max(self.largest[case.precision], found)
        if not found <= LIMITS[case.precision]:
            self.blame(f"{case.label} {name} {what}: off by {found:.2e}")

    def blame(self, what: str) -> None:
        print("WRONG", what, flush=True)
        self.wrong.append(what)

    def step(self) -> None:
        """Carry out one operation, with a fault or without, and at times renew an operator."""
        index = int(self.rng.integers(len(self.cases)))
        if self.rng.random() < 0.05:
            self.cases[index] = self.case()
        case = self.cases[index]
        names = ["matvec", "matmat", "adjoint", "tensors", "block", "submatrix", "matvec", "matmat", "submatrix"]
        names += (
            ["journal"] if case.matrix == "jacobian" else ["damped", "solve", "eigsh", "density", "blocks", "journal"]
        )
        name = "check" if self.rng.random() < 0.02 else self.pick(*names)
        fault = self.pick(*INJECTED, "NaN", "random loss", "written to") if self.rng.random() < 0.3 else ""
        try:
            if fault:
                self.disturbed(case, name, fault)
            else:
                self.compare(case, name)
        except Exception:
            self.blame(f"{case.label} {name} {fault}: {traceback.format_exc()}")

    def disturbed(self, case: Case, name: str, fault: str) -> None:
        world = case.world
        if fault == "written to" or (fault != "random loss" and self.rng.random() < 0.7):
            world.move(1 - world.at if fault == "written to" else world.at)  # what was kept is to be made anew
        if fault == "random loss":  # which shows only beside another pass
            name = self.pick("matvec", "matmat", "tensors")
            self.compare(case, "matvec")
        world.fault = Fault(fault, int(self.rng.integers(30 if name in LONG else 6)))
        self.faults[fault] += 1
        try:
            self.compare(case, name, fault)
            outcome = "right" if world.fault.struck or fault == "written to" else "not met"
        except (*REFUSALS, *INJECTED.values(), RefusedError) as error:
            chain = [error]
            while chain[-1] is not None:
                chain.append(chain[-1].__cause__ or chain[-1].__context__)
            known = REFUSALS if fault in ("NaN", "random loss") else ()
            if (
                isinstance(error, RefusedError)
                or any("soak: " in str(one) for one in chain)
                or isinstance(error, known)
            ):
                outcome = "raised"
            else:
                raise
        finally:
            world.fault = Fault()
        self.outcomes[f"{fault}: {outcome}"] += 1
        self.compare(case, "matvec", f"after {fault}, {outcome}, in {name}")


def resident() -> float:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def growth(memory: list[tuple[int, float]]) -> float:
    """Return by how many MiB in 1,000 operations memory grew in the second half; 0 where that is too short to tell."""
    half = np.array(memory[len(memory) // 2 :])
    return 1000 * float(np.polyfit(*half.T, 1)[0]) if len(half) > 2 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="duration in minutes (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="file for the results (default: benchmarks/results/soak.json)"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # that data comes in another order, or a matrix is indefinite
    soak = _Soak(options.seed)
    ctypes.CDLL(None).malloc_trim(0)  # what the references took would hide a leak
    begun = time.monotonic()
    memory: list[tuple[int, float]] = []
    for done in itertools.count():
        passed = time.monotonic() - begun
        if passed >= 30.0 * len(memory) or passed >= 60 * options.minutes:
            memory.append((sum(soak.counts.values()), resident()))
            print(f"{passed / 60:.1f} min, {done} steps, {memory[-1]}, wrong: {len(soak.wrong)}", flush=True)
        if passed >= 60 * options.minutes or len(soak.wrong) >= 20:
            break
        soak.step()
    results = {
        "environment": environment(),
        "seed": options.seed,
        "minutes": (time.monotonic() - begun) / 60,
        "operations": dict(sorted(soak.counts.items())) | {"all": sum(soak.counts.values())},
        "faults": dict(sorted(soak.faults.items()))
        | {"torn journal": soak.operations.torn}
        | {"all": sum(soak.faults.values()) + soak.operations.torn},
        "outcomes": dict(sorted(soak.outcomes.items())),
        "wrong": soak.wrong,
        "largest relative error": {kind: {"found": soak.largest[kind], "limit": LIMITS[kind]} for kind in LIMITS},
        "resident MiB": {"first": memory[0][1], "last": memory[-1][1], "every 30 s": [one for _, one in memory]},
        "MiB per 1,000 operations, second half": growth(memory),
    }
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    raise SystemExit(bool(soak.wrong) or growth(memory) > GROWTH)


if __name__ == "__main__":
    main()
