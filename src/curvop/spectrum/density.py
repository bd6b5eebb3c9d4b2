"""Estimate spectral densities and traces of matrix functions by stochastic Lanczos quadrature.

`density` runs the Lanczos process from several random vectors, the probes. It returns a `SpectralDensity` (see
`curvop.spectrum.spectral_density`), which holds one Gauss quadrature for each probe.

References
----------
Ubaru, Chen, Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl.
38(4), algorithm 1. Golub, Meurant (2010), "Matrices, Moments and Quadrature with Applications", Princeton University
Press.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.operators.keywords import named_keywords
from curvop.operators.progress import step_bar
from curvop.operators.validation import (
    available_bytes,
    check_fits,
    integer,
    random_generator,
    real_operator,
)
from curvop.spectrum.checkpoint import Checkpoint
from curvop.spectrum.counting import deadline_after
from curvop.spectrum.eigen import eigsh
from curvop.spectrum.lanczos import Lanczos, device_of, gauss_rules, product_dtype, resolution, runs_at_once
from curvop.spectrum.spectral_density import SpectralDensity
from curvop.storage.fingerprint import fingerprint

__all__ = ["density"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)
_MISS_PROBABILITY = 0.05  # probability that an eigenvalue lies beyond `SpectralDensity.range_errors`


@named_keywords
def density(
    A: LinearOperator,
    num_probes: int = 8,
    num_steps: int = 64,
    *,
    rng: int | np.random.Generator | None = 0,
    deflate: int = 0,
    memory: int | None = None,
    checkpoint: str | Path | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> SpectralDensity:
    r"""Estimate the spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Use `density` to see the shape of a spectrum, and to estimate the fraction of eigenvalues in an interval or the
    trace of any function of the matrix. Use `eigsh` for single eigenvalues with proven error bounds. If only the trace
    or the Frobenius norm is needed and the eigenvalues decay, use `trace` or `frobenius_norm`, which need fewer
    products.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real symmetric operator.
    num_probes : int
        Number K of random vectors. Error bars require at least two vectors.
    num_steps : int
        Number m of Lanczos steps per probe. At most ``N - deflate`` steps are taken. About 10 steps are enough to find
        outliers. More steps resolve finer structure in the bulk of the spectrum.
    rng : int or numpy.random.Generator, optional
        Seed or generator for the probes. The same seed gives the same probes on every device. If it is None, every run
        uses different probes.
    deflate : int
        Number k of eigenvalues that are computed individually (Papyan, 2018). These are the k eigenvalues of largest
        magnitude. `eigsh` finds and certifies them, and the result stores them in ``atoms``. The probes are made
        orthogonal to the eigenvectors of these eigenvalues. If the spectrum has a few outliers, deflation reduces the
        spread between the probes. The time limit ``seconds`` does not apply to the search for the k eigenvalues. A
        checkpoint records these eigenvalues once all k are found.
    memory : int, optional
        Number of bytes for the Lanczos bases and the deflated eigenvectors; half of the free memory by default. Each
        probe needs about 8 N m bytes (4 N m if the products are in single precision). Each deflated eigenvector needs
        8 N bytes (12 N in single precision). If the bases of all probes do not fit, the probes are processed in groups.
    checkpoint : str or path, optional
        Directory in which every step is recorded. A later call with the same seed continues from the last recorded step
        after a run was killed, and extends a finished density if it asks for more steps or probes. With fewer steps or
        probes, it uses a part of the records. If the products are bitwise reproducible, the result of a continued run
        is bitwise identical to that of an uninterrupted run. The products of curvop's operators are bitwise
        reproducible if their argument ``columns`` is a fixed number, for example 1. The directory holds 8 N bytes (4 N
        in single precision) for each step of each probe, in the file ``steps.records``. You may delete this file if you
        need no more steps. It is deleted if it takes more space than is free on the disk.
    seconds : float, optional
        Time limit. A run that reaches the limit returns a result with fewer steps or probes, but with at least one
        step. To continue, repeat the call with the same checkpoint.
    progress : bool
        Show a progress bar that counts products.

    Returns
    -------
    SpectralDensity
        Nodes and weights of the quadratures, with methods for fractions of eigenvalues, quantiles and traces.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid or a product is not finite.
    ValueError, RecordFileError, OSError
        If the checkpoint belongs to another computation (the message names the difference), is in use by another
        process, is damaged, or cannot be written.
    MemoryError
        If the deflated eigenvectors and the basis of one probe do not fit into the memory. This is checked before any
        computation.
    RuntimeError
        If fewer than ``deflate`` eigenvalues converge.

    Warns
    -----
    RuntimeWarning
        If the certificate of the deflated eigenvalues shows that `eigsh` may have missed an eigenvalue.

    See Also
    --------
    eigsh : Find and certify eigenvalues at one end of the spectrum.
    trace : Estimate the trace of a matrix whose eigenvalues decay.
    frobenius_norm : Estimate the Frobenius norm of a matrix.
    blocks : Estimate the densities of all diagonal blocks of a curvature matrix.

    Notes
    -----
    Each probe is a vector v of random signs. The probe defines a measure on the spectrum: the integral of a function f
    over this measure is :math:`v^\top f(A) \, v / N`. Starting from v, m steps of the Lanczos process give a Gauss
    quadrature with m nodes, which is exact for polynomials up to degree 2 m - 1. The cost is K m products. Each step
    advances all probes with one block product.

    The Lanczos process runs in float64, or in float32 if the products with `A` are accurate to single precision only.
    Float32 halves the memory and the time. The basis vectors are kept orthogonal to the square root of machine epsilon,
    so that no outlier appears more than once, and the nodes are as accurate as the products.

    The Wasserstein distance between the density and the spectrum decreases as 1 / m with the number of steps, and as
    :math:`1 / \sqrt{K N}` with the number of probes (Chen, Trogdon, Ubaru, 2021).

    References
    ----------
    Ubaru, Chen, Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal.
    Appl. 38(4), algorithm 1. Ghorbani, Krishnan, Xiao (2019), "An investigation into neural net optimization via
    Hessian eigenvalue density", arXiv:1901.10159. Papyan (2018), "The full spectrum of deepnet Hessians at scale",
    arXiv:1811.07062. Chen, Trogdon, Ubaru (2021), "Analysis of stochastic Lanczos quadrature for spectrum
    approximation", arXiv:2105.06595.

    Examples
    --------
    Compare the density of a small network's Hessian with the exact eigenvalues:

    >>> import numpy as np
    >>> import torch
    >>> from curvop import HessianLinearOperator, spectrum
    >>> rng = np.random.default_rng(0)
    >>> X, y = torch.from_numpy(rng.normal(size=(50, 10))), torch.from_numpy(rng.integers(3, size=50))
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    >>> params = dict(model.named_parameters())
    >>> with torch.no_grad():
    ...     for p in params.values():
    ...         _ = p.copy_(torch.from_numpy(rng.normal(size=tuple(p.shape)) / 4))
    >>> H = HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), params, [(X, y)])
    >>> found = spectrum.density(H, num_probes=4, num_steps=30, progress=False)
    >>> exact = np.linalg.eigvalsh(H @ np.eye(H.shape[1]))
    >>> trace = found.trace()
    >>> bool(abs(trace.value - exact.sum()) < 4 * trace.error)
    True
    >>> share = found.cdf(0.1)
    >>> bool(abs(share.value - (exact <= 0.1).mean()) < 4 * share.error)
    True
    >>> bool(abs(found.range[1] - exact[-1]) < 1e-8)
    True
    """
    until = deadline_after(seconds)
    A = real_operator(A)
    _check_arguments(A, num_probes, num_steps, deflate)
    size, device = A.shape[0], device_of(A)
    num_steps = min(num_steps, size - deflate)
    at_once = runs_at_once(A, num_probes, num_steps, _memory_for_bases(A, deflate, memory))
    generator = random_generator(rng)
    seed = json.dumps(generator.bit_generator.state, default=str)
    signs = generator.choice(np.array([-1, 1], dtype=np.int8), (num_probes, size))

    def settings() -> dict[str, str]:
        arguments = {"num_probes": num_probes, "num_steps": num_steps, "deflate": deflate}
        seeded = {"rng": hashlib.blake2b(seed.encode(), digest_size=16).hexdigest()}
        return fingerprint(A) | {name: str(value) for name, value in arguments.items()} | seeded

    record = Checkpoint(checkpoint, settings)
    with (
        contextlib.closing(record),
        step_bar("density", progress, num_probes * num_steps) as bar,
    ):
        values, vectors, num_products = record.deflated_eigenpairs(
            lambda: _deflated_eigenpairs(A, deflate, memory, progress)
        )
        deflated = torch.from_numpy(vectors).to(device) if deflate else None
        matrices, shares = np.zeros((num_probes, 2, num_steps)), np.zeros(num_probes)
        lengths, complete, idle = np.zeros(num_probes, dtype=np.int64), True, True
        for group in record.groups(num_probes, num_steps, at_once):
            probes = torch.from_numpy(signs[group]).to(device).to(torch.float64)
            if deflated is not None:
                probes -= (probes @ deflated.T) @ deflated
            shares[group] = _sums_of_weights(probes)
            found, steps, finished = record.finished_runs(group, num_steps)
            # `idle` allows at least one step per call, so that repeated calls with short time limits make progress.
            if not finished and (idle or time.monotonic() <= until):
                run = _run(A, probes, num_steps, deflated, record, group, bar, until, idle)
                idle, finished = False, not run.running
                if finished or run.lengths.sum() > steps.sum():
                    found, steps = np.stack([run.alphas, run.betas], axis=1), run.lengths
                if finished:
                    record.finish_group(group, steps, found)
            else:
                bar.update(int(steps.sum()))
            matrices[group], lengths[group], complete = found, steps, complete and finished
    begun = lengths > 0
    matrices, lengths, longest = matrices[begun], lengths[begun], int(lengths.max())
    if complete:  # keep the trailing weight of 0 that marks a probe with an invariant subspace
        longest = min(longest + 1, num_steps)
    matrices = matrices[:, :, :longest]
    nodes, weights = gauss_rules(matrices[:, 0], matrices[:, 1], lengths)
    weights *= shares[begun, None]
    num_products += int(lengths.sum())
    scale = max(np.abs(nodes).max(), np.abs(values).max(initial=0.0))
    return SpectralDensity(size, nodes, weights, values, num_products, complete, matrices, float(resolution(A) * scale))


def _check_arguments(A: LinearOperator, num_probes: int, num_steps: int, deflate: int) -> None:
    if A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ValueError(f"A has shape {A.shape}, but must be square and symmetric, and not empty")
    for name, value, least in (("num_probes", num_probes, 1), ("num_steps", num_steps, 1), ("deflate", deflate, 0)):
        integer(name, value, least)
    if deflate >= A.shape[0]:
        raise ValueError(f"deflate is {deflate}, but must be less than {A.shape[0]}, the number of eigenvalues of A")


def _memory_for_bases(A: LinearOperator, count: int, memory: int | None) -> int:
    """Return the number of bytes that remain for the Lanczos bases after the deflated eigenvectors are stored.

    The eigenvectors are stored in float64. If the bases are in float32, the eigenvectors are also stored in float32.
    """
    available = available_bytes(device_of(A), memory)
    needed: int = count * A.shape[0] * (8 if product_dtype(A) == torch.float64 else 8 + 4)
    what = f"the deflated eigenspace, {count} vectors of {A.shape[0]:,} numbers,"
    check_fits(needed, available, what, "reduce deflate")
    return available - needed


def _deflated_eigenpairs(A: LinearOperator, count: int, memory: int | None, progress: bool) -> tuple[Any, Any, int]:
    """Return the k eigenvalues of largest magnitude, their eigenvectors ``(k, N)``, and the number of products."""
    if not count:
        return np.zeros(0), np.zeros((0, A.shape[0])), 0
    method = "arpack" if device_of(A).type == "cpu" else "lanczos"
    found = eigsh(A, count, "LM", method=method, memory=memory, side="parameters", progress=progress)
    if not found.converged:
        raise RuntimeError(f"deflate is {count}, but only {len(found.values)} eigenvalues converged: reduce deflate")
    return found.values.astype(np.float64), np.ascontiguousarray(found.vectors.T, dtype=np.float64), found.products


def _sums_of_weights(probes: torch.Tensor) -> Array:
    """Return the sum of the weights of each probe: its squared norm, divided by N.

    A probe in the deflated space is zero up to rounding. Its sum is 0, and it is replaced by an arbitrary vector.
    """
    size, squares = probes.shape[1], (probes**2).sum(1).cpu().numpy()
    negligible = squares <= 1e-20 * size
    squares[negligible] = 0
    if negligible.any():
        probes[torch.from_numpy(negligible)] = torch.linspace(1, 2, size, dtype=probes.dtype, device=probes.device)
    return np.asarray(squares / size)


def _run(
    A: LinearOperator,
    probes: torch.Tensor,
    num_steps: int,
    deflated: torch.Tensor | None,
    record: Checkpoint,
    group: slice,
    bar: Any,
    until: float,
    idle: bool,
) -> Lanczos:
    """Run the Lanczos process from a group of probes, until it is finished or time is up."""
    run = Lanczos(A, probes, num_steps, deflated)
    record.replay(group, run)
    bar.update(int(run.lengths.sum()))
    while run.running and (time.monotonic() < until or idle or not run.lengths.any()):
        idle = False
        runs = run.step()
        bar.update(len(runs))
        record.add_step(group, run, runs)
    return run
