"""Compare this package and its peers: the same work, in turns, with the error beside every time.

Run ``python -m pip install -e ".[bench]" && python benchmarks/peers.py``; it writes ``benchmarks/results/peers.json``
and ``peers.md``, and takes about two hours. ``--quick`` measures only what the goals against the fastest peer need, in
about 25 minutes on two cores, and writes ``fastest.json`` and ``fastest.md``. Every pair of a model and a kind of work
has a process of its own, in which the contenders take turns; a time is the median of its runs, an error is relative to
double backward in float64, and what is wrong is not timed. Peak memory is that of a process that does nothing but build
one contender and multiply. On a GPU: ``--device cuda --out benchmarks/results/peers-gpu``, with ``--larger 32`` for
batches that fill it, and ``--tf32`` to allow TF32 for everybody. ``--add`` keeps the results of earlier runs that this
run does not repeat, so that a file can be recorded in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import CONTENDERS, EIGENTHINGS_SEED, WORK, Work
from environment import add_device_options, environment, peak_mb, set_tf32
from goals import AHEAD, GOALS, PEERS, reached
from models import PEER_PROBLEMS, on_device
from reference import exact, finish, flops, medians, on_device_ms
from scipy.sparse.linalg import LinearOperator, eigsh
from tables import cell, document
from torch.nn.attention import SDPBackend, sdpa_kernel

RESULTS = Path(__file__).resolve().parent / "results"
#: Beyond this relative error a product is wrong in float32, however fast; an eigenpair's residual is judged by `TOL`.
WRONG = 1e-5
WRONG_TF32 = 1e-2
TOL = 1e-3
GIB = 2**30
#: What takes more than `LONG` seconds runs only `FEW` times.
LONG, FEW = 10.0, 3
#: Untimed calls of this package's products, at most, and the seconds after which no further call follows.
SETTLING_CALLS, SETTLING_SECONDS = 50, 10.0
#: Models of which a product and its peak are measured, by these contenders.
LARGE = ("GPT-2 124M",)
LARGE_CONTENDERS = (
    *("curvop", "curvop compiled", "curvlinops to_scipy"),
    *("eigenthings", "PyHessian single", "by hand", "gradient"),
)
#: What ``--quick`` leaves: the goals against the fastest peer, without what takes many minutes.
QUICK_WORK = (*AHEAD, "eigsh")
QUICK_CONTENDERS = ("curvop", "curvop compiled", "curvop, lanczos", "curvop compiled, lanczos", *PEERS, "gradient")
QUICK_LEFT_OUT = (
    *((model, "product") for model in LARGE),
    *((model, "eigsh") for model in ("GPT 4 layers, d = 128", "ResNet-18 64x64, eval")),
)
PACKAGES = ("curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian")
#: Entries from which vectors are float32: in float64, to read and write them would be a good part of a product.
MANY = 10**7
TINY = ("tutorial MLP 7-5-5-3",)
#: What would take many minutes more, to compile or to run: the Hessian of curvlinops is wrong for the GPT, and products
#: with the ResNet are faster with other peers. The solver of hessian-eigenthings does not restart, so that its first
#: call tries many numbers of steps.
LEFT_OUT = {
    ("GPT 4 layers, d = 128", "block of 8"): ("curvlinops compiled",),
    ("GPT 4 layers, d = 128", "eigsh"): ("curvlinops compiled", "curvop compiled, one batch"),
    ("ResNet-18 64x64, eval", "block of 8"): ("curvop compiled, one batch",),
    ("ResNet-18 64x64, eval", "off diagonal"): ("curvop compiled", "curvop compiled, whole"),
    ("ResNet-18 64x64, eval", "slice"): ("curvop compiled", "curvop compiled, restricted"),
    ("ResNet-18 64x64, eval", "eigsh"): (
        "curvop compiled, one batch",
        "curvlinops compiled",
        "PyHessian single",
        "eigenthings lanczos",
    ),
}
#: What the peak of memory is measured of: in a table's words, the kind of work and the contender.
PEAKS = {
    name if kind == "product" else f"{name}, {kind}": (kind, name)
    for kind, names in (("product", CONTENDERS), ("nothing kept", ("curvop", "curvop compiled")))
    for name in names
    if name in CONTENDERS
    and kind in CONTENDERS[name].kinds
    and not CONTENDERS[name].yardstick
    and not name.endswith(("one batch", "tensors"))
}

Problem = dict[str, Any]


def kinds_of(model: str) -> list[str]:
    if model in LARGE:
        return ["product"]
    return [kind for kind in WORK if kind != "dense" or model in TINY]


def competing(model: str, kind: str, only: list[str] | None = None) -> list[str]:
    return [
        name
        for name, contender in CONTENDERS.items()
        if kind in contender.kinds
        and name in (only or CONTENDERS)
        and (model not in LARGE or name in LARGE_CONTENDERS)
        and name not in LEFT_OUT.get((model, kind), ())
    ]


def layer(problem: Problem, name: str) -> list[str]:
    """Return the names of a layer's parameters, the weight's `name` among them."""
    prefix = name.rpartition(".")[0]
    return [other for other in problem["params"] if other.rpartition(".")[0] == prefix]


def work_of(kind: str, problem: Problem) -> Work:
    """Return rows, columns and the vectors to multiply."""
    weights = [name for name, value in problem["params"].items() if value.ndim > 1]
    first, last = layer(problem, weights[0]), layer(problem, weights[-1])
    rows, cols = {
        "last layer": (last, last),
        "off diagonal": (first, last),
        "slice": (weights[:1], weights[:1]),
    }.get(kind, (None, None))
    width = sum(problem["params"][name].numel() for name in cols or problem["params"])
    if kind == "dense":
        return Work(kind, rows, cols, np.eye(width))
    shape = (width, 8) if kind.endswith("block of 8") else (width,)
    dtype = np.float32 if width > MANY else np.float64
    return Work(kind, rows, cols, np.random.default_rng(0).standard_normal(shape).astype(dtype, copy=False))


def solve(operator: Any, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenpairs by SciPy's solver, or by the solver of a package if `operator` is a function.

    The starting vector is that of hessian-eigenthings' solver, which takes no other. It has much influence on the
    number of products.
    """
    generator = torch.Generator().manual_seed(EIGENTHINGS_SEED)
    v0 = torch.randn(len(work.vectors), generator=generator).numpy().astype(work.dtype)
    if not isinstance(operator, LinearOperator):
        return operator(v0, 10, TOL)
    return eigsh(operator, k=10, which="LA", tol=TOL, v0=v0)


def error_of(value: Any, problem: Problem, work: Work, reference: np.ndarray | None) -> float:
    """Return the relative error of a product, or the relative residual of eigenpairs."""
    if reference is None:
        values, vectors = value
        value, reference = vectors * values, exact(problem, vectors)
    value = value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def problem_of(model: str, options: argparse.Namespace) -> Problem:
    torch.manual_seed(0)
    return on_device(PEER_PROBLEMS[model](), options.device, options.larger)


def measure(model: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time all contenders on one kind of work, in turns."""
    problem = problem_of(model, options)
    work = work_of(kind, problem)
    solving = kind == "eigsh"
    reference = None if solving else exact(problem, work.vectors, work.rows, work.cols, work.matrix)
    wrong = TOL if solving else WRONG_TF32 if options.tf32 else WRONG
    results: dict[str, dict[str, Any]] = {}
    tasks: dict[str, Callable[[], Any]] = {}
    for name in competing(model, kind, options.only):
        contender = CONTENDERS[name]
        try:
            start = time.perf_counter()
            built = contender.build(problem, work)
            value = solve(built, work) if solving else built(work.vectors)
            results[name] = {"first_s": time.perf_counter() - start}
            if not contender.yardstick:
                if solving and not contender.compiled:
                    built = None  # every run builds its own
                results[name]["error"] = error_of(value, problem, work, reference)
        except Exception as error:  # what a peer cannot do is a result, too
            results[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            continue
        if solving:
            results[name]["values"] = value[0].tolist()
        tasks[name] = run_of(contender, built, problem, work)
    # Rounding errors can decide on which side of zero the input of a ReLU lies. They then change a product of any
    # contender by much more than epsilon: 7e-5 for ResNet-18, if the images change by 1e-6.
    wrong = max(wrong, 2 * results.get("by hand", {}).get("error", 0.0))
    tasks = {name: task for name, task in tasks.items() if results[name].get("error", 0.0) < wrong}
    for name, task in tasks.items():
        if name.startswith("curvop") and not solving:
            settle(task)
    for name, (taken, runs) in timed(tasks, options.runs, options.room).items():
        device = {"device_ms": on_device_ms(tasks[name], runs)} if options.device == "cuda" else {}
        results[name] |= {"ms": taken, "runs": runs, **device}
    found = {"P": sum(value.numel() for value in problem["params"].values()), "wrong": wrong, "by": results}
    if kind == "product":
        if len(problem["data"]) == 1:
            results |= {f"{name}, one batch": results[name] for name in results if name.startswith("curvop")}
        found["flops"] = {
            name: flops(CONTENDERS[name].build(problem, work), work.vectors) for name in ("curvop", "gradient")
        }
    return found


def run_of(contender: Any, built: Any, problem: Problem, work: Work) -> Callable[[], Any]:
    if work.kind == "eigsh":
        return lambda: solve(contender.build(problem, work) if built is None else built, work)
    return lambda: built(work.vectors)


def settle(task: Callable[[], Any]) -> None:
    """Repeat a product until the operator has chosen the number of columns and has recorded its operations.

    Like the compilation of the peers, this happens once, and is not timed.
    """
    start = time.perf_counter()
    for _ in range(SETTLING_CALLS):
        task()
        finish()
        if time.perf_counter() - start > SETTLING_SECONDS:
            return


def timed(tasks: dict[str, Callable[[], Any]], least: int, room: float) -> dict[str, tuple[float, int]]:
    """Return the median milliseconds and the number of runs of each task: more than `least` if there is room."""
    start, taken = time.perf_counter(), 1e-9
    for task in tasks.values():
        task()
        finish()
        taken = time.perf_counter() - start
        if least * taken > room:
            break
    runs = max(min(least, FEW) if taken > LONG else least, min(300, int(room / taken)))
    found = medians(*tasks.values(), repeats=runs, warm=0, fair=True)
    return {name: (taken, runs) for name, taken in zip(tasks, found, strict=True)}


def peak_of(model: str, kind: str, options: argparse.Namespace) -> float:
    problem, name = problem_of(model, options), options.peak
    work = work_of(kind, problem)
    gradient = CONTENDERS["gradient"].build(problem, work)
    gradient(work.vectors)  # what torch's libraries take at their first use

    def run() -> None:
        built = CONTENDERS[name].build(problem, work)
        for _ in range(2):
            built(work.vectors)

    return peak_mb(run, options.device)


def child(options: argparse.Namespace, *what: str) -> Any:
    """Run this file in a process of its own; return what it found, or why it found nothing."""
    passed = [f"--{name}={getattr(options, name)}" for name in ("runs", "room", "memory", "device", "larger")]
    passed += [f"--only={name}" for name in options.only or ()] + ["--tf32"] * options.tf32
    command = [sys.executable, __file__, "--child", *passed, *what]
    # SciPy's BLAS on one thread: its others would wait actively, on the cores that torch computes on.
    own = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, timeout=options.limit, env=own).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {options.limit:g} s"}
        out.seek(0), err.seek(0)
        if code < 0:
            return {"failed": f"killed by {signal.Signals(-code).name}"}
        if code:
            return {"failed": (err.read().strip().splitlines() or [f"exit status {code}"])[-1][:300]}
        return json.loads(out.read().splitlines()[-1])


def in_child(options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    if options.device == "cpu":  # an error in here, not the end of the machine
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * GIB),) * 2)
    set_tf32(options.tf32)
    [model], [kind] = options.model, options.work
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        result = peak_of(model, kind, options) if options.peak else measure(model, kind, options)
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=list(PEER_PROBLEMS), action="append", help="only this model; can be repeated"
    )
    parser.add_argument(
        "--work", choices=WORK, action="append", help="only this kind of work, and no peak memory; can be repeated"
    )
    parser.add_argument(
        "--only", choices=list(CONTENDERS), action="append", help="only this contender; can be repeated"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only what the goals against the fastest peer need, without peak memory; without what takes many minutes, "
        "unless --model names it",
    )
    parser.add_argument("--runs", type=int, help="minimum number of runs (default: 7, or 3 with --quick)")
    parser.add_argument(
        "--room",
        type=float,
        default=3.0,
        help="add runs until the contenders have run for this many seconds (default: 3)",
    )
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that one process may take (default: 1800)")
    parser.add_argument(
        "--memory",
        type=float,
        default=0.6 * memory,
        help="memory limit of one process in GiB, on a CPU only (default: 60 %% of the memory)",
    )
    add_device_options(parser)
    parser.add_argument("--add", action="store_true", help="keep the results of the file that this run does not repeat")
    parser.add_argument("--larger", type=int, default=1, help="enlarge the batches by this factor (default: 1)")
    parser.add_argument(
        "--out",
        type=Path,
        help="path of the results, without .json and .md (default: benchmarks/results/peers, or fastest with --quick)",
    )
    parser.add_argument("--peak", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.runs = options.runs or (FEW if options.quick else 7)
    options.out = options.out or RESULTS / ("fastest" if options.quick else "peers")
    return options


def main() -> None:
    options = arguments()
    if options.child:
        in_child(options)
        return
    start = time.perf_counter()
    set_tf32(options.tf32)
    if options.quick:
        options.work, options.only = options.work or QUICK_WORK, options.only or QUICK_CONTENDERS
    command = shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]])
    about = environment(options.device) | {"tf32": options.tf32, "peers": versions(), "command": command}
    rows, peaks, earlier = [], [], 0.0
    if options.add:
        found = json.loads(options.out.with_suffix(".json").read_text())
        rows, peaks, earlier = found["rows"], found["peaks"], found["seconds"]
        for row in rows:
            row.setdefault("recorded", f"{found['environment']['date']}, commit {found['environment']['commit']}")
    for model in options.model or PEER_PROBLEMS:
        for kind in kinds_of(model):
            left_out = options.quick and not options.model and (model, kind) in QUICK_LEFT_OUT
            if kind not in (options.work or WORK) or left_out:
                continue
            began = time.perf_counter()
            row = {"model": model, "work": kind} | child(options, "--model", model, "--work", kind)
            row["seconds"] = time.perf_counter() - began
            rows = sorted([*(other for other in rows if not same(other, row)), row], key=position)
            write(options.out, about, earlier + time.perf_counter() - start, rows, peaks)
            cells = [row["failed"]] if "failed" in row else [f"{name} {cell(own)}" for name, own in row["by"].items()]
            print(f"{model}, {kind} [{row['seconds']:.0f} s]: " + "; ".join(cells), flush=True)
        if not options.work:
            found = {
                label: child(options, "--model", model, "--work", kind, "--peak", name)
                for label, (kind, name) in PEAKS.items()
                if name in competing(model, "product", options.only)
            }
            peaks = [*(other for other in peaks if other["model"] != model), {"model": model, "peak_mb": found}]
            print(f"{model}, peak MB: {found}", flush=True)
            write(options.out, about, earlier + time.perf_counter() - start, rows, peaks)
    sys.exit(any("failed" in row for row in rows))


def same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return (row["model"], row["work"]) == (other["model"], other["work"])


def position(row: dict[str, Any]) -> tuple[int, int]:
    """Return the place of a row in the tables: by model, then by the kind of work."""
    return list(PEER_PROBLEMS).index(row["model"]), list(WORK).index(row["work"])


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write(out: Path, about: dict[str, Any], seconds: float, rows: list[Any], peaks: list[Any]) -> None:
    results = {
        "environment": about,
        "seconds": seconds,
        "wrong": WRONG_TF32 if about["tf32"] else WRONG,
        "wrong_eigenpairs": TOL,
        "left_out": [f"{model}, {kind}: {', '.join(names)}" for (model, kind), names in LEFT_OUT.items()],
        "goals": [goal for goal in (reached(goal, rows) for goal in GOALS) if goal["models"]],
        "rows": rows,
        "peaks": peaks,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    out.with_suffix(".md").write_text(document(results))


if __name__ == "__main__":
    main()
