"""Stochastic Lanczos quadrature."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from curvop.operators.available_memory import available_bytes, check_fits
from curvop.operators.progress import step_bar
from curvop.operators.validation import random_generator, real_operator, whole_number
from curvop.spectrum.checkpoint import Checkpoint
from curvop.spectrum.density import SpectralDensity
from curvop.spectrum.lanczos import Lanczos, basis_dtype, device_of, resolution, runs_at_once
from curvop.spectrum.timed import end_of
from curvop.storage.fingerprint import fingerprint

__all__ = ["density"]


def density(
    A: LinearOperator,
    *,
    num_probes: int = 8,
    num_steps: int = 64,
    rng: int | np.random.Generator | None = 0,
    deflate: int = 0,
    memory: int | None = None,
    checkpoint: str | Path | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> SpectralDensity:
    r"""Estimate the density of a symmetric operator's eigenvalues by stochastic Lanczos quadrature.

    Every probe is a vector of random signs; the Lanczos process from it gives a Gauss quadrature for the eigenvalues,
    exact for polynomials up to degree 2 m - 1 in what it sees. The recurrences are in float64 (where `A` is float32, in
    that: half the memory, half the time) and keep their vectors orthogonal, so that an outlier counts once; all probes
    take their steps together, with one block product. The Wasserstein distance between the density and the spectrum
    falls as 1 / m, and with the probes as :math:`1 / \sqrt{K N}` (Chen, Trogdon, Ubaru, 2021).

    Of use for the shape of a spectrum, and for the trace of any function of the matrix. For single eigenvalues with
    proof take `eigsh`; for a trace or a norm alone, with fewer products where eigenvalues decay, `trace` and
    `frobenius_norm`.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric.
    num_probes : int
        K; error bars need two.
    num_steps : int
        m, at most N. Outliers need some 10, the fine structure of the bulk as many as there is patience for.
    rng : int or numpy.random.Generator, optional
        Of the probes, which are the same on every device; None for others in every run.
    deflate : int
        So many eigenvalues of largest magnitude are found by `eigsh`, taken out, and added back as what they are
        (Papyan, 2018): sharper where a few outliers are of interest, and the probes' spread no longer stems from them.
        To find them takes its time, whatever `seconds` says; they are certified, with a warning where one may be
        missing, and recorded in a checkpoint when all of them are found.
    memory : int, optional
        Bytes for the bases, 8 N m and some for each probe, half of it where `A` is float32, and for `deflate` vectors
        of 8 N (12 N where `A` is float32); by default half of what is free. Where they do not fit, probes take turns.
    checkpoint : str or path, optional
        A directory where every step is recorded. A run that was killed takes its steps up again from there, called in
        the same way with the same seed, and ends with the same bits as one that was not (where products repeat to the
        last bit: this package's do with ``columns=1``, or any fixed number). It keeps 8 N bytes for each step of the
        probes that are under way, and nodes and weights of those that are done.
    seconds : float, optional
        End after so long with the steps that there are, a new one at least: a density of fewer of them. With a
        checkpoint it can be taken up again.
    progress : bool
        Count products on a bar.

    Returns
    -------
    SpectralDensity

    Raises
    ------
    ValueError, TypeError
        For arguments that cannot be, and where a product is not finite.
    ValueError, RecordFileError, OSError
        Where the checkpoint is of something else (naming it), in use, damaged, or cannot be written.
    MemoryError
        Where the deflated vectors and the basis of a single probe do not fit, before anything is computed.

    References
    ----------
    Ubaru, Chen, Saad (2017), SIAM J. Matrix Anal. Appl. 38(4), algorithm 1; Ghorbani, Krishnan, Xiao (2019),
    arXiv:1901.10159; Papyan (2018), arXiv:1811.07062; Chen, Trogdon, Ubaru (2021), arXiv:2105.06595.
    """
    until = end_of(seconds)
    A = real_operator(A)
    _check(A, num_probes, num_steps, deflate)
    size, device = A.shape[0], device_of(A)
    num_steps = min(num_steps, size - deflate)
    at_once = runs_at_once(A, num_probes, num_steps, _left_for_runs(A, deflate, memory))
    generator = random_generator(rng)
    seed = json.dumps(generator.bit_generator.state, default=str)
    signs = generator.choice(np.array([-1, 1], dtype=np.int8), (num_probes, size))

    def settings() -> dict[str, str]:
        asked = {"num_probes": num_probes, "num_steps": num_steps, "deflate": deflate}
        seeded = {"rng": hashlib.blake2b(seed.encode(), digest_size=16).hexdigest()}
        return fingerprint(A) | {name: str(value) for name, value in asked.items()} | seeded

    kept = Checkpoint(checkpoint, settings)
    at_once = kept.fixed("probes at once", at_once)  # whatever memory is free today: other blocks round otherwise
    total = num_probes * num_steps
    with (
        contextlib.closing(kept),
        step_bar("density", progress, total) as bar,
    ):
        values, vectors, taken = kept.deflated(lambda: _largest(A, deflate, memory, progress))
        known = torch.from_numpy(vectors).to(device) if deflate else None
        nodes, weights = np.zeros((num_probes, num_steps)), np.zeros((num_probes, num_steps))
        recurrences = np.zeros((num_probes, 2, num_steps))
        done, whole, idle = kept.groups(), True, True
        for first in range(0, num_probes, at_once):
            group = slice(first, min(first + at_once, num_probes))
            if first in done:
                bar.update(int(done[first][2].sum()))
            elif not idle and time.monotonic() > until:
                nodes, weights, recurrences, whole = nodes[:first], weights[:first], recurrences[:first], False
                break
            else:
                probes = torch.from_numpy(signs[group]).to(device).to(torch.float64)
                if known is not None:
                    probes -= (probes @ known.T) @ known
                # A step at least, so that whoever comes back again and again gets on.
                done[first], complete = _quadrature(A, probes, num_steps, known, kept, first, bar, until, idle)
                idle = False
                whole = whole and complete
                if complete:
                    kept.finish(first, *done[first])
            nodes[group], weights[group], lengths, recurrences[group] = done[first]
            taken += int(lengths.sum())
    longest = max(int(lengths.max()) for _, _, lengths, _ in done.values())
    if whole:  # a weight of 0 tells of each probe that it ended by itself
        longest = min(longest + 1, num_steps)
    nodes, weights, recurrences = nodes[:, :longest], weights[:, :longest], recurrences[:, :, :longest]
    scale = max(np.abs(nodes).max(), np.abs(values).max(initial=0.0))
    return SpectralDensity(size, nodes, weights, values, taken, whole, recurrences, float(resolution(A) * scale))


def _quadrature(
    A: LinearOperator,
    probes: torch.Tensor,
    num_steps: int,
    known: Any,
    kept: Checkpoint,
    first: int,
    bar: Any,
    until: float,
    idle: bool,
) -> tuple[list[Any], bool]:
    """Return nodes, weights, lengths and recurrences of a group of probes, and whether their runs are complete."""
    squares = (probes**2).sum(1).cpu().numpy()
    within = squares <= 1e-20 * probes.shape[1]  # of a probe in the deflated space rounding is left: of no weight
    squares[within] = 0
    if within.any():
        probes[torch.from_numpy(within)] = torch.linspace(
            1, 2, probes.shape[1], dtype=probes.dtype, device=probes.device
        )
    run = Lanczos(A, probes, num_steps, known)
    kept.replay(first, run)
    bar.update(int(run.lengths.sum()))
    while run.running and (time.monotonic() < until or idle or not run.lengths.any()):
        idle = False
        runs = run.step()
        bar.update(len(runs))
        kept.add(first, run, runs)
    nodes, weights = run.quadrature()
    weights *= (squares / probes.shape[1])[:, None]
    return [nodes, weights, run.lengths, np.stack([run.alphas, run.betas], axis=1)], not run.running


def _check(A: LinearOperator, num_probes: int, num_steps: int, deflate: int) -> None:
    if A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ValueError(f"A has shape {A.shape}, but must be square and symmetric, and not empty")
    for name, value, least in (("num_probes", num_probes, 1), ("num_steps", num_steps, 1), ("deflate", deflate, 0)):
        whole_number(name, value, least)
    if deflate >= A.shape[0]:
        raise ValueError(f"deflate is {deflate}, but must be less than the {A.shape[0]} eigenvalues of A")


def _left_for_runs(A: LinearOperator, count: int, memory: int | None) -> int:
    """Return what deflated vectors, and their copy in the precision of the bases, leave of `memory` bytes."""
    available = available_bytes(device_of(A), memory)
    precise = basis_dtype(A) == torch.float64
    needed: int = count * A.shape[0] * (8 if precise else 8 + basis_dtype(A).itemsize)
    check_fits(needed, available, f"what is deflated, {count} vectors of {A.shape[0]:,} numbers,", "deflate fewer")
    return available - needed


def _largest(A: LinearOperator, count: int, memory: int | None, progress: bool) -> tuple[Any, Any, int]:
    """Return eigenvalues ``(k,)`` and vectors ``(k, N)`` that are certain, and the products they took."""
    if not count:
        return np.zeros(0), np.zeros((0, A.shape[0])), 0
    from curvop.spectrum.eigen import eigsh

    method = "arpack" if device_of(A).type == "cpu" else "device"
    found = eigsh(A, count, "LM", method=method, memory=memory, progress=progress)
    if not found.converged:
        raise RuntimeError(f"deflate is {count}, but only {len(found.values)} eigenvalues converged: deflate fewer")
    return found.values.astype(np.float64), np.ascontiguousarray(found.vectors.T, dtype=np.float64), found.products
