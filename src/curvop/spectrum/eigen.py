"""Certified eigenvalues of symmetric operators by ARPACK, LOBPCG, thick-restart Lanczos, or a dense solver.

`eigsh` validates its arguments, runs one of four methods with defaults chosen for curvature matrices, and certifies the
result. Each method is a function that takes a ``_Problem`` and returns ``_Eigenpairs``. The dictionary ``_METHODS``
lists the four methods:

- ``arpack``: implicitly restarted Lanczos, implemented by ``scipy.sparse.linalg.eigsh`` (Lehoucq, Sorensen, Yang,
  "ARPACK Users' Guide", 1998, doi:10.1137/1.9780898719628).
- ``lobpcg``: LOBPCG, implemented by ``scipy.sparse.linalg.lobpcg`` (Knyazev, "Toward the optimal preconditioned
  eigensolver: locally optimal block preconditioned conjugate gradient method", SIAM J. Sci. Comput. 23(2), 2001,
  doi:10.1137/S1064827500366124).
- ``lanczos``: thick-restart block Lanczos, implemented in `curvop.spectrum.thick_restart` (Wu, Simon, "Thick-restart
  Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22(2), 2000,
  doi:10.1137/S0895479898334605).
- ``dense``: N products form the matrix, and ``numpy.linalg.eigh`` computes all its eigenvalues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, lobpcg
from scipy.sparse.linalg import eigsh as scipy_eigsh

from curvop.operators.error_text import warn_user
from curvop.operators.gram import GramLinearOperator
from curvop.operators.keywords import named_keywords
from curvop.operators.progress import step_bar
from curvop.operators.transfer import aligned
from curvop.operators.validation import available_bytes, check_fits, integer, random_generator, real_scalar
from curvop.spectrum.certificate import WHICH, Certificate, Evidence, certify_within
from curvop.spectrum.counting import CountedOperator, TimedOperator, TimeUpError, deadline_after, symmetric_operator
from curvop.spectrum.eigen_result import NO_TIME, EigenResult
from curvop.spectrum.lanczos import device_of, product_dtype, product_precision
from curvop.spectrum.missed_search import search_missed
from curvop.spectrum.noise import NUM_PRODUCTS, measure_noise
from curvop.spectrum.norms import binary_exponent
from curvop.spectrum.repair import EigenRepair
from curvop.spectrum.smaller_side import UNSUITABLE, fits, lifted, smaller_side, solve_formed
from curvop.spectrum.thick_restart import RitzPairs, orthonormalized, thick_restart

__all__ = ["EigenResult", "eigsh", "without_verdicts"]

Array = NDArray[Any]

_SEARCH, _MIN_SEARCH = 60, 5  # Lanczos steps of a search; in less than 5, it cannot rule out missed eigenvalues
_MAX_RESTARTS = 1000  # SciPy's default of 10 N restarts is impractical for large N
_MIN_ARPACK_BASIS = 30  # SciPy's default of 20 vectors takes twice as many products for clustered eigenvalues
_MIN_LANCZOS_BASIS = 40  # Hessian of `digits`, which="SA": 652 products with 40 vectors, 1,187 with 30
_ARPACK_ATTEMPTS = 3
_DENSE_SIZE = 2000  # up to this many rows, forming the matrix is a good replacement for LOBPCG
_SINGLE_TOL = 1e-4  # rounding errors of float32 vectors change residuals by about 1e-6 of the norm of the operator
_SINGLE_SMALLEST = 1e-25  # eigenvalues below may underflow in float32
_LOBPCG_GUARDS = 2  # extra vectors in LOBPCG's block, because the last vectors of a block converge slowly
_LOBPCG_CHUNK = 40  # LOBPCG iterations between two convergence checks
_LOBPCG_BLOCKS = 16  # peak memory of LOBPCG in blocks of vectors (measured)


@named_keywords
def eigsh(
    A: Any,
    k: int = 6,
    which: str = "LA",
    *,
    method: str = "arpack",
    tol: float = 0.0,
    maxiter: int | None = None,
    ncv: int | None = None,
    block: int | None = None,
    v0: Any = None,
    rng: int | np.random.Generator | None = 0,
    memory: int | None = None,
    certificate: bool = True,
    seconds: float | None = None,
    side: str = "auto",
    progress: bool = True,
) -> EigenResult:
    """Find and certify k eigenvalues and their eigenvectors at an end of the spectrum of a symmetric operator.

    Use this function instead of ``scipy.sparse.linalg.eigsh`` if you want error bounds, a check for missed eigenvalues,
    a time or memory limit, or a solver that runs on the GPU. To certify eigenpairs from another solver, use `certify`.
    For an overview of all eigenvalues, use `density`.

    Parameters
    ----------
    A : LinearOperator or matrix, shape (N, N)
        The real symmetric operator. If the dtype of `A` is float32, ARPACK works with float32 vectors. The operators of
        this package have dtype float64 by default, even for float32 models, because float64 vectors give residuals that
        are 6 to 40 times smaller.
    k : int, optional
        The number of eigenvalues, from 1 to N.
    which : {'LA', 'SA', 'LM', 'SM', 'BE'}, optional
        Which eigenvalues to find, as in SciPy: the algebraically largest ('LA') or smallest ('SA'), the largest
        ('LM') or smallest ('SM') in magnitude, or half from each end ('BE', with one more from the upper end if k is
        odd). A search for 'SM' takes many products and often does not converge.
    method : {'arpack', 'lobpcg', 'lanczos', 'dense'}, optional
        The eigensolver.

        - 'arpack' is implicitly restarted Lanczos (SciPy's ``eigsh``). It applies the operator to one vector at a time
          and takes the fewest products. Start with this method, or with 'lanczos' if A has more than 100,000 rows.
        - 'lobpcg' is SciPy's ``lobpcg``, for 'LA' and 'SA' only. It applies the operator to blocks of ``k + 2`` vectors
          and takes more products in total than 'arpack'. Use 'lobpcg' if a block product is much cheaper than
          ``k + 2`` single products, for example if the data are slow to read or a single product does not keep the
          device busy.
        - 'lanczos' is thick-restart block Lanczos, for all values of `which` except 'SM'. The basis stays on the device
          of the operator, so only the final eigenvectors are copied from a GPU to the host. For the same `ncv`, this
          method stores half as many vectors as 'arpack'. If the products are accurate to single precision only and
          `tol` is at least 1e-4, the basis has dtype float32, and the eigenvectors are orthonormalized in float64 at
          the end. Rounding errors then change the residuals by about 1e-6 of the norm of A.
        - 'dense' forms the matrix from N products and computes all its eigenvalues. The other methods switch to 'dense'
          if the matrix is so small that an iteration would not be cheaper.
    tol : float, optional
        The stopping tolerance. For 'arpack' and 'lanczos', it is the relative accuracy of the eigenvalues, and 0 means
        machine precision. For a float32 model, 1e-6 gives the same accuracy as 0 and can take a third of the products.
        For 'lobpcg', `tol` bounds the residuals relative to the norm of the operator. 'lobpcg' has two lower limits for
        `tol`: the 2/3 power of machine precision, and four times the noise of the products. If `tol` is smaller than
        one of these limits, the larger limit is used instead.
    maxiter : int, optional
        The maximum number of restarts ('arpack' and 'lanczos') or iterations ('lobpcg'). The default is
        ``min(1000, 10 * N)``.
    ncv : int, optional
        The number of basis vectors of 'arpack' and 'lanczos', greater than k (for 'lanczos', at least ``k + block``).
        The default is ``max(2 * k + 1, 30)`` for 'arpack'. For 'lanczos', it is ``max(2 * k + 1, k + 2 * block, 40)``,
        rounded up to a multiple of `block`. If that many vectors do not fit into `memory`, the default is the largest
        number that fits.
    block : int, optional
        The number of vectors of each block product, for 'lanczos' only. The default is 1, which takes about as many
        products as 'arpack'. A block of b vectors finds eigenvalues of multiplicity up to b without the help of
        rounding errors, but 2 takes up to 1.8 times as many products as 1. Use a larger block if many eigenvalues are
        multiple, or if a block product is much cheaper than single products.
    v0 : array_like, shape (N,), optional
        The starting vector. The default is a random vector. 'lobpcg' and 'lanczos' use `v0` as the first vector of
        their starting block. The other vectors of the block are random.
    rng : int, numpy.random.Generator or None, optional
        The seed or generator for all random vectors. Runs with the same seed give the same result.
    memory : int, optional
        The number of bytes that the solver may use. The default is half of the free memory.
    certificate : bool, optional
        Whether to certify the result with `certify`, using the tolerance ``max(1e-4, 2 * tol)``. A certificate takes
        ``k + 8`` products for the error bounds, and further products to search for missed eigenvalues. The search stops
        when it has an answer, usually after 10 to 60 products, and at the latest after as many products as the solver
        took, or 60. If an eigenvalue seems to be missed, the search takes up to twice as many products. The missed
        eigenvalue is then computed and replaces another one, the search is repeated, and ``note`` says so. These
        repairs and the searches between them take at most 60 products more than the solver. If eigenvalues are still
        missing, a warning is issued.
    seconds : float, optional
        The time limit in seconds. There is no limit by default. The clock is checked before each product (in block
        products, before every 16 columns), and a product that has started is completed. If time runs out, 'lanczos'
        returns its current eigenpairs, and 'lobpcg' returns the eigenpairs of its last convergence check (one every 40
        iterations). 'arpack' and 'dense' have no partial results and raise a ``TimeoutError``. Error bounds
        take ``k + 8`` products. 'lanczos' and 'lobpcg' reserve time for these products, unless `seconds` is too short
        for them. If no time is left for error bounds, the result has no certificate.
    side : {'auto', 'parameters', 'examples'}, optional
        Which of the two matrices ``A = S.T @ S`` and ``S @ S.T`` is solved. They have the same non-zero eigenvalues,
        and the result always contains eigenvectors of A.

        - 'parameters' solves A.
        - 'examples' solves ``A.gram()``, which has one row for each example, or for each example and output. `which`
          must be 'LA' or 'LM', and `k` must be at most the number of rows. If `seconds` is not given, S fits into
          `memory`, and an iterative method would cost more, S is formed and all eigenvalues are computed.
        - 'auto' solves ``A.gram()`` if A has this method, if the Gram matrix is smaller than A and has the requested
          eigenvalues, and if `v0` is not given. Otherwise, 'auto' solves A.
    progress : bool, optional
        Whether to show a progress bar that counts the products.

    Returns
    -------
    EigenResult
        The eigenpairs, in ascending order of the eigenvalues, and their certificate. ``values, vectors = eigsh(...)``
        unpacks the eigenpairs. ``result.largest`` and ``result.smallest`` are the largest and smallest eigenvalue.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, if a product is not finite, or if `side` is 'examples' and A is not of the form
        ``S.T @ S``.
    MemoryError
        If the solver does not fit into `memory`.
    TimeoutError
        If time runs out and the method is 'arpack' or 'dense'.

    Warns
    -----
    RuntimeWarning
        If the solver does not converge, or if the certificate reports a problem.

    See Also
    --------
    certify : Certify eigenpairs from any solver.
    density : Estimate the distribution of all eigenvalues.
    track : Follow extreme eigenvalues during training.

    Notes
    -----
    ARPACK [1]_ and thick-restart Lanczos [2]_ build a Krylov basis of `ncv` vectors. When the basis is full, they
    restart: they keep the best Ritz vectors and extend the basis again. A restart takes about ``ncv - k`` products with
    ARPACK, and half as many with thick-restart Lanczos. The orthogonalization takes ``O(N * ncv)`` operations per
    product. LOBPCG [3]_ improves a block of vectors by Rayleigh-Ritz steps in a subspace that is three times as large
    as the block. All these solvers can miss members of a cluster of eigenvalues and still report convergence (SciPy
    issue 26112). Random blocks of vectors make this less likely [4]_. The certificate therefore includes a search for
    missed eigenvalues. If the search finds one, it also returns an approximate eigenvector that is orthogonal to the
    computed eigenvectors. Lanczos starts again from this vector, on the orthogonal complement of the computed
    eigenvectors. The k requested eigenpairs in the span of all vectors are then certified. If the rows of S are formed,
    all eigenvalues of the Gram matrix are computed, and a certificate takes two products with A.

    References
    ----------
    .. [1] R. B. Lehoucq, D. C. Sorensen, C. Yang, "ARPACK Users' Guide", SIAM, 1998. doi:10.1137/1.9780898719628
    .. [2] K. Wu, H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
       Anal. Appl. 22(2), 2000. doi:10.1137/S0895479898334605
    .. [3] A. V. Knyazev, "Toward the optimal preconditioned eigensolver: locally optimal block preconditioned conjugate
       gradient method", SIAM J. Sci. Comput. 23(2), 2001. doi:10.1137/S1064827500366124
    .. [4] "A structural bound for cluster robustness of randomized small-block Lanczos", 2025. arXiv:2507.10144

    Examples
    --------
    Compute the two largest eigenvalues of the Hessian of a small network:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import HessianLinearOperator, spectrum
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(40, 4).double(), torch.randn(40, 1).double()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    >>> H = HessianLinearOperator(model, nn.MSELoss(), model.parameters(), [(X, y)])
    >>> result = spectrum.eigsh(H, 2, "LA", progress=False)
    >>> result.values.round(4)
    array([2.1943, 3.1168])
    >>> round(result.largest, 4)
    3.1168

    The certificate bounds the errors of the two eigenvalues. The search found no missed eigenvalue:

    >>> result.ok, bool(result.certificate.bounds.max() < 1e-12), result.certificate.missed
    (True, True, None)
    """
    until = deadline_after(seconds)
    if method == "device":
        warn_user("method='device' is now method='lanczos'", DeprecationWarning)
        method = "lanczos"
    A = symmetric_operator(A)
    k, start = _validate(A, k, which, method, tol, maxiter, ncv, block, v0)
    generator = random_generator(rng)
    request = _Request(
        k, which, method, tol, maxiter, ncv, block, start, generator, memory, certificate, seconds, until, progress
    )
    gram = smaller_side(A, side, k, which, start is not None)
    if gram is None:
        result = _solve(A, None, request)
    else:
        try:
            result = _solve(A, gram, request)
        except UNSUITABLE:
            if side != "auto":
                raise
            result = _solve(A, None, request)
    if not result.ok and (certificate or not result.converged):
        warn_user(result.verdict)
    return result


@contextlib.contextmanager
def without_verdicts() -> Iterator[None]:
    """Suppress the warnings of `eigsh` and `curvop.solve` about failed convergence or certification.

    All other warnings are shown as usual.
    """
    with warnings.catch_warnings():
        verdicts = "not converged|not certified|converged: relative residual"
        warnings.filterwarnings("ignore", verdicts, RuntimeWarning)
        yield


def _validate(
    A: LinearOperator, k: Any, which: Any, method: Any, tol: Any, maxiter: Any, ncv: Any, block: Any, v0: Any
) -> tuple[int, Array | None]:
    """Validate the arguments of `eigsh`. Return k as an int, and v0 as an array or None."""
    size = A.shape[0]
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k is a {type(k).__name__}, but must be an integer") from None
    if not 1 <= k <= size:
        raise ValueError(f"k is {k}, but must be between 1 and {size}, the number of rows of A")
    if which not in WHICH:
        raise ValueError(f"which is {which!r}, but must be one of {', '.join(WHICH)}")
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(_METHODS)}")
    if method == "lobpcg" and which not in ("LA", "SA"):
        raise ValueError(f"which is {which!r}, but method='lobpcg' supports only 'LA' and 'SA': use method='arpack'")
    if method == "lanczos" and which == "SM":
        raise ValueError("which is 'SM', but method='lanczos' does not find these: use method='arpack'")
    if which == "BE" and k == 1:
        raise ValueError("k is 1, but must be at least 2 for which='BE', one from each end")
    if not 0 <= real_scalar("tol", tol) < 1:
        raise ValueError(f"tol is {tol}, but must be at least 0 and less than 1")
    if maxiter is not None:
        integer("maxiter", maxiter, 1)
    if ncv is not None and not (k < integer("ncv", ncv, 1) <= size or k == ncv == size):
        raise ValueError(f"ncv is {ncv}, but must be greater than k = {k} and at most {size}")
    if block is not None:
        if method != "lanczos":
            own = " (lobpcg uses blocks of k + 2 vectors)" if method == "lobpcg" else ""
            raise ValueError(f"block is {block!r}, but method={method!r} does not take it{own}: use method='lanczos'")
        integer("block", block, 1)
        if ncv is not None and ncv < min(k + block, size):
            raise ValueError(f"ncv is {ncv}, but must be at least k + block = {k + block}: use a larger ncv")
    if v0 is None:
        return k, None
    start = np.asarray(v0)
    if start.shape != (size,) or not np.can_cast(start.dtype, np.float64, "same_kind"):
        raise ValueError(f"v0 has shape {start.shape} and dtype {start.dtype}, but must be real of shape ({size},)")
    if not (np.isfinite(start).all() and start.any()):
        raise ValueError("v0 must be finite and not zero")
    return k, start


@dataclasses.dataclass(frozen=True)
class _Request:
    """The validated arguments of `eigsh`, except the operator. `v0` is an array or None."""

    k: int
    which: str
    method: str
    tol: float
    maxiter: int | None
    ncv: int | None
    block: int | None
    v0: Array | None
    rng: np.random.Generator
    memory: int | None
    certificate: bool
    seconds: float | None
    until: float
    progress: bool


def _solve(A: LinearOperator, gram: GramLinearOperator | None, request: _Request) -> EigenResult:
    """Compute eigenpairs of A and certify them, with products with A, or with its Gram matrix if it is given."""
    k, which, rng = request.k, request.which, request.rng
    if gram is not None and request.seconds is None:
        available = available_bytes(gram.device, request.memory)
        if fits(gram, k, available):
            return _solve_formed(A, gram, request, available)
    shift = 0.0 if gram is None else gram.shift
    gram = None if gram is None else gram.shifted(-shift)
    solved = A if gram is None else gram
    available = available_bytes(device_of(A) if request.method == "lanczos" else None, request.memory)
    start, ncv = request.v0, request.ncv
    if gram is not None:
        start = None if start is None else gram.factor @ start
        ncv = None if ncv is None else min(ncv, gram.shape[0])
    if request.seconds is not None:
        A = TimedOperator(A, request.until)
        solved = A if gram is None else TimedOperator(gram, request.until)
        has_partial_result = request.method in ("lanczos", "lobpcg")
        solved.reserved = k + NUM_PRODUCTS if request.certificate and has_partial_result else 0
    with step_bar("eigsh", request.progress) as bar:
        counted = CountedOperator(solved, bar, _vector_dtype(solved, request))
        if start is not None:  # a large or small number may not be representable in float32
            start = np.ldexp(start, -binary_exponent(start)).astype(counted.dtype)
        changed = {"A": counted, "available": available, "v0": start, "ncv": ncv}
        problem = _Problem(**{**vars(request), **changed})
        try:
            pairs = _METHODS[request.method](problem)
        except TimeUpError:
            raise TimeoutError(
                f"time was up after {request.seconds} s and {counted.products} products, and the methods 'arpack' and "
                f"'dense' have no partial results: allow more seconds, or pass method='lanczos' and ncv < "
                f"{solved.shape[0]}"
            ) from None
    products, note = counted.products, pairs.note
    values, vectors = pairs.values, pairs.vectors
    if gram is not None:
        values, vectors, lifts = lifted(gram, values.astype(np.float64), vectors.astype(np.float64), rng)
        values = values + shift
        products, note = products + lifts, _joined(f"from the Gram matrix of {gram.shape[0]:,} rows", note)
    # The certificate multiplies combinations of the eigenvectors. Always certify them in this order, so that a journal
    # of an earlier version answers the same products.
    order = _most_wanted_first(values, which)
    values, vectors, proof = values[order].astype(np.float64), vectors[:, order], None
    if request.certificate:
        # Do not claim that incomplete results are the outermost eigenvalues. For 'BE', an incomplete result of ARPACK
        # does not even show how many eigenvalues come from each end.
        incomplete = (pairs.timed_out and pairs.num_converged < k) or (which == "BE" and len(values) < k)
        claim = None if incomplete else which
        # Continue with the same generator, so that the search and the solver start from different vectors.
        tol = _certificate_tol(request)
        repair = EigenRepair(request.tol, lambda values: _select(values, which, k), products + _SEARCH, available)
        proof, repaired = _certify_in_time(A, values, vectors, claim, tol, products, rng, request.progress, repair)
        if proof is None:
            note = _joined(note, NO_TIME)
        else:
            products += proof.products
        if repaired is not None:
            values = np.ldexp(repaired.values, repaired.exponent)
            vectors = repaired.vectors  # in float64, as they were certified
            note = _joined(note, f"{repair.added} missed eigenvalue{'s' * (repair.added > 1)} found by the search")
    converged = pairs.num_converged == k
    timed_out = pairs.timed_out and not converged
    return EigenResult(
        values, vectors, proof, converged, products, pairs.method, which, k, note, pairs.num_converged, timed_out
    )


def _vector_dtype(A: LinearOperator, request: _Request) -> Any:
    """Return the dtype of the solver's vectors, or None to use the dtype of A."""
    if request.method == "arpack":
        return None
    # If products are less accurate than float32, for example because of TF32, the solver's operations would be, too.
    is_single = product_dtype(A) == torch.float32 and product_precision(A) <= torch.finfo(torch.float32).eps
    return np.float32 if is_single and request.method == "lanczos" and request.tol >= _SINGLE_TOL else np.float64


def _solve_formed(A: LinearOperator, gram: GramLinearOperator, request: _Request, available: int) -> EigenResult:
    """Compute and certify eigenpairs of A from the rows of its factor."""
    k, which = request.k, request.which
    with step_bar("eigsh", request.progress) as bar:
        counted = CountedOperator(A, bar, np.float64)
        claim = which if request.certificate else None
        found = solve_formed(counted, gram, k, claim, _certificate_tol(request), request.rng, available)
    note = f"from the {gram.shape[0]:,} rows of its factor, rank {found.rank:,}"
    proof = found.certificate
    if proof is not None:
        proof = dataclasses.replace(proof, products=counted.products)
    return EigenResult(found.values, found.vectors, proof, True, counted.products, "dense", which, k, note, k)


def _certificate_tol(request: _Request) -> float:
    return max(1e-4, 2 * request.tol)


def _joined(*notes: str) -> str:
    return ", ".join(filter(None, notes))


def _certify_in_time(
    A: LinearOperator,
    values: Array,
    vectors: Array,
    which: str | None,
    tol: float,
    products: int,
    rng: np.random.Generator,
    progress: bool,
    repair: EigenRepair,
) -> tuple[Certificate | None, Evidence | None]:
    """Certify the result of a solver that took `products` products, within the time limit, and repair it if needed.

    If time is short, shorten or skip the search for missed eigenvalues. Without time for error bounds, return no
    certificate. Also return the eigenpairs if they were repaired.
    """
    most = max(_SEARCH, products)
    if isinstance(A, TimedOperator):
        A.reserved = 0
        left = A.columns_left - len(values) - NUM_PRODUCTS
        if left < 0:
            return None, None
        most = int(min(most, left / 2))  # confirming a missed eigenvalue doubles the products
    searched = which if most >= _MIN_SEARCH else None
    steps = max(1, min(max(_SEARCH, products // 4), most)), most
    try:
        certificate, repaired = certify_within(A, values, vectors, searched, tol, steps, rng, progress, repair)
    except TimeUpError:
        return None, None
    return dataclasses.replace(certificate, which=which), repaired


@dataclasses.dataclass(frozen=True)
class _Problem(_Request):
    """The arguments of the eigensolvers: `A` is the operator, and `available` is the available memory in bytes."""

    A: CountedOperator
    available: int

    @property
    def size(self) -> int:
        """The number of rows of A."""
        return int(self.A.shape[0])

    @property
    def max_restarts(self) -> int:
        """The maximum number of restarts or iterations."""
        return self.maxiter or min(_MAX_RESTARTS, 10 * self.size)

    def random_start(self, columns: int | None = None) -> Array:
        """Return random vectors in the operator's dtype, of shape ``(N,)`` or ``(N, columns)``."""
        shape = (self.size,) if columns is None else (self.size, columns)
        return self.rng.standard_normal(shape).astype(self.A.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class _Eigenpairs:
    """The output of an eigensolver: eigenvalues ``(n,)`` in any order, and eigenvectors ``(N, n)``.

    `method` is the name of the eigensolver that computed the eigenpairs. If the eigensolver or its settings differ from
    the request, `note` states the reason.
    """

    values: Array
    vectors: Array
    num_converged: int
    method: str
    note: str = ""
    timed_out: bool = False


def _arpack(problem: _Problem) -> _Eigenpairs:
    """Run SciPy's ``eigsh``.

    If the basis would have N vectors, form the matrix instead, which takes only N products.
    """
    basis = problem.ncv or min(problem.size, max(2 * problem.k + 1, _MIN_ARPACK_BASIS))
    if basis >= problem.size:
        return _dense(problem, "the basis would have spanned the whole space")
    basis, note = _fit_basis(problem, basis, "ARPACK's", 2)
    start = problem.random_start() if problem.v0 is None else problem.v0
    options = {"ncv": basis, "tol": problem.tol, "maxiter": problem.max_restarts}
    for attempt in range(_ARPACK_ATTEMPTS):
        try:
            values, vectors = scipy_eigsh(
                problem.A, problem.k, which=problem.which, v0=start, rng=problem.rng, **options
            )
        except ArpackNoConvergence as error:
            return _Eigenpairs(error.eigenvalues, error.eigenvectors, len(error.eigenvalues), "arpack", note)
        except ArpackError:
            # ARPACK can fail if its starting vector lies in a small invariant subspace: try another starting vector.
            start = problem.random_start()
            if not problem.A.matvec(start).any():
                return _zero_matrix(problem, "arpack")
            if attempt == _ARPACK_ATTEMPTS - 1:
                raise
        else:
            return _Eigenpairs(values, vectors, len(values), "arpack", note)
    raise AssertionError("unreachable")


def _lobpcg(problem: _Problem) -> _Eigenpairs:
    """Run SciPy's ``lobpcg`` with guard vectors.

    The iteration stops if all residuals are at most ``goal * scale``. The goal is the largest of `tol`, the 2/3 power
    of machine precision, and four times the noise of the products. The scale is an estimate of the norm of the
    operator. The operator is divided by the scale, because SciPy's thresholds are absolute. If time runs out, return
    the eigenpairs of the last completed chunk of iterations.
    """
    size, k = problem.size, problem.k
    if size < 5 * k:  # SciPy would apply the operator to an identity matrix of integers
        note = f"lobpcg needs N >= 5 k, but N is {size} and k is {k}"
        if size <= _DENSE_SIZE:
            return _dense(problem, note)
        return dataclasses.replace(_arpack(problem), note=note)
    width = min(k + _LOBPCG_GUARDS, size // 5)
    check_fits(
        _LOBPCG_BLOCKS * 8 * size * width,
        problem.available,
        f"LOBPCG's blocks of {width} vectors of {size:,} numbers",
        "use a smaller k, method='arpack', or a block of the matrix",
    )
    X = problem.random_start(width)
    if problem.v0 is not None:
        X[:, 0] = problem.v0
    X = np.linalg.qr(X)[0]
    left, num_converged = problem.max_restarts, 0
    values, scale = np.zeros(0), 1.0
    try:
        noise = measure_noise(problem.A, X, problem.A.matmat(X), problem.rng)
        exponent = binary_exponent(np.array([noise.norm]))
        extremes = search_missed(
            lambda x: np.ldexp(problem.A.dot(x), -exponent), X[:, :0], (-np.inf, np.inf), 0.0, 10, problem.rng
        )
        scale = max(noise.norm, float(np.ldexp(max(abs(extremes.low), abs(extremes.high)), exponent)))
        if scale == 0:
            return _zero_matrix(problem, "lobpcg")
        precision = float(np.finfo(problem.A.dtype).eps) ** (2 / 3)
        goal = max(problem.tol, precision, 4 * noise.relative)
        while num_converged < k and left > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # large residuals, which are checked below
                values, X, history = lobpcg(
                    lambda block: problem.A.matmat(block) / scale,
                    X,
                    tol=goal,
                    maxiter=min(left, _LOBPCG_CHUNK),
                    largest=problem.which == "LA",
                    retResidualNormsHistory=True,
                )
            left -= _LOBPCG_CHUNK
            num_converged = int((np.atleast_1d(history[-1])[:k] <= goal).sum())
    except TimeUpError:
        count = min(k, len(values))
        return _Eigenpairs(values[:count] * scale, X[:, :count], num_converged, "lobpcg", timed_out=True)
    return _Eigenpairs(values[:k] * scale, X[:, :k], num_converged, "lobpcg")


def _lanczos(problem: _Problem) -> _Eigenpairs:
    """Run thick-restart block Lanczos. The basis is stored on the device of the operator.

    If numbers overflow or underflow in float32, the iteration starts again in float64.
    """
    size, k = problem.size, problem.k
    block = problem.block or 1
    default = -(-max(2 * k + 1, k + 2 * block, _MIN_LANCZOS_BASIS) // block) * block
    basis = problem.ncv or min(size, default)
    if basis + block > size:
        return _dense(problem, "the basis would have spanned the whole space")
    basis, note = _fit_basis(problem, basis, "the Lanczos", 1, block)
    first = problem.random_start() if problem.v0 is None else problem.v0
    starts = np.vstack([first[None], problem.random_start(block - 1).T]).astype(problem.A.dtype, copy=False)

    def select(values: Array, count: int) -> Array:
        return _select(values, problem.which, count)

    is_single = problem.A.dtype == np.float32
    rows = aligned(torch.from_numpy(starts)).to(problem.A.device)
    pairs: RitzPairs | None
    try:
        pairs = thick_restart(problem.A.multiply_rows, rows, k, basis, problem.tol, problem.max_restarts, select)
    except ValueError:  # a product is not finite
        if not is_single:
            raise
        pairs = None
    underflows = is_single and pairs is not None and not pairs.timed_out and abs(pairs.values).max() < _SINGLE_SMALLEST
    if pairs is None or underflows:
        problem.A.dtype = np.dtype(np.float64)
        return _lanczos(problem)
    note = note if pairs.values.any() or pairs.timed_out else "the matrix is zero"
    vectors = orthonormalized(pairs.vectors.double()).T.cpu().numpy()
    return _Eigenpairs(pairs.values, vectors, pairs.num_converged, "lanczos", note, pairs.timed_out)


def _dense(problem: _Problem, note: str = "") -> _Eigenpairs:
    """Form the matrix from N products, compute all its eigenvalues, and return the k requested eigenpairs."""
    check_fits(
        5 * 8 * problem.size**2,
        problem.available,
        f"the matrix of {problem.size:,} rows, formed for its {problem.k:,} eigenvalues,",
        "use a smaller k, or a block of the matrix",
    )
    matrix = problem.A.matmat(np.eye(problem.size, dtype=problem.A.dtype)).astype(np.float64)
    matrix += matrix.T.copy()
    values, vectors = np.linalg.eigh(matrix / 2)
    order = _select(values, problem.which, problem.k)
    return _Eigenpairs(values[order], vectors[:, order], problem.k, "dense", note)


_METHODS: dict[str, Callable[[_Problem], _Eigenpairs]] = {
    "arpack": _arpack,
    "lobpcg": _lobpcg,
    "lanczos": _lanczos,
    "dense": _dense,
}


def _fit_basis(problem: _Problem, basis: int, owner: str, copies: int, block: int = 1) -> tuple[int, str]:
    """Return the number of basis vectors to use, and a note.

    If the default number of vectors does not fit into memory, the number is reduced, and the note states this.
    Otherwise, the note is empty. A number chosen by the user is not reduced. The solver is assumed to need memory for
    `copies` vectors per basis vector, and for ``k + 1 + 3 * block`` other vectors.

    Raises
    ------
    MemoryError
        If the basis does not fit.
    """
    vector, note, others = problem.size * problem.A.dtype.itemsize, "", problem.k + 1 + 3 * block
    fitting = max(problem.k + 1 + block, (problem.available // vector - others) // copies)
    if problem.ncv is None and fitting < basis:
        basis, note = fitting, f"ncv was reduced to {fitting} to fit into memory"
    check_fits(
        max(copies * basis + others, 3 * problem.k) * vector,  # at the end, float32 vectors are copied to float64
        problem.available,
        f"{owner} basis of {basis} vectors of {problem.size:,} numbers",
        "use a smaller k or ncv, method='lobpcg', or a block of the matrix",
    )
    return basis, note


def _select(values: Array, which: str, count: int) -> Array:
    """Return the indices of the `count` eigenvalues that `which` requests. `values` must be in ascending order."""
    if which != "BE":
        order: Array = _most_wanted_first(values, which)[:count]
        return order
    low = count // 2
    ends: Array = np.r_[:low, len(values) - (count - low) : len(values)]
    return ends


def _most_wanted_first(values: Array, which: str) -> Array:
    """Return the indices that sort eigenvalues by how much `which` wants them. 'BE' is sorted in ascending order."""
    key = {"LA": -values, "LM": -np.abs(values), "SM": np.abs(values)}.get(which, values)
    return np.argsort(key, kind="stable")


def _zero_matrix(problem: _Problem, method: str) -> _Eigenpairs:
    """Return the eigenpairs of a zero matrix: k zero eigenvalues with random orthonormal eigenvectors."""
    vectors = np.linalg.qr(problem.random_start(problem.k))[0]
    return _Eigenpairs(np.zeros(problem.k), vectors, problem.k, method, "the matrix is zero")
