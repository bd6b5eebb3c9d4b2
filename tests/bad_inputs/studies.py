"""What solvers and studies cannot be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn

from bad_inputs.rows import (
    COMPLEX,
    DENSE,
    DENSITY,
    INDEFINITE,
    MODEL,
    PAIRS,
    PARAMS,
    WIDE,
    H,
    area,
    file_with,
    mlp,
)
from curvop import (
    callbacks,
    check,
    preconditioner,
    select,
    solve,
    spectrum,
)
from curvop.distributed import serve
from curvop.kernels.errors import NotFactorableError, UnknownNameError
from curvop.storage.fingerprint import OtherProblemError


def checkpoint_of_something_else(tmp: Path) -> None:
    spectrum.density(DENSE, num_probes=2, rng=0, checkpoint=tmp, progress=False)
    spectrum.density(DENSE, num_probes=2, rng=1, checkpoint=tmp, progress=False)


def checkpoint_in_a_file(tmp: Path) -> None:
    spectrum.density(DENSE, checkpoint=file_with(tmp, b"x"), progress=False)


area(
    "Solves and preconditioners",
    (
        "a right-hand side of another length",
        lambda: solve(DENSE, np.ones(3), damping=1.0),
        ValueError,
        "b has shape (3,)",
    ),
    ("a matrix that is not square", lambda: solve(WIDE, np.ones(3), damping=1.0), ValueError, "A has shape (3, 4)"),
    ("a complex matrix", lambda: solve(COMPLEX, np.ones(4), damping=1.0), TypeError, "A has dtype complex128"),
    (
        "a right-hand side with NaN",
        lambda: solve(DENSE, np.full(4, np.nan), damping=1.0),
        ValueError,
        "b is not finite",
    ),
    (
        "an initial guess of another shape",
        lambda: solve(DENSE, np.ones(4), 1.0, x0=np.ones((4, 2))),
        ValueError,
        "x0 has shape (4, 2)",
    ),
    (
        "time that is up before it begins",
        lambda: solve(DENSE, np.ones(4), 1.0, seconds=-1),
        ValueError,
        "seconds is -1",
    ),
    (
        "a dict for a matrix without parameters",
        lambda: solve(DENSE, {"weight": MODEL[0].weight}, 1.0),
        TypeError,
        "b is a dict",
    ),
    (
        "a preconditioner that returns another shape",
        lambda: solve(DENSE, np.ones(4), 1.0, preconditioner=lambda X: X[:2], progress=False),
        ValueError,
        "preconditioner returned an array of shape (2, 1)",
    ),
    ("damping in words", lambda: solve(DENSE, np.ones(4), damping="much"), TypeError, "damping is a str"),
    ("a tolerance of 0", lambda: solve(DENSE, np.ones(4), damping=1.0, rtol=0), ValueError, "rtol is 0"),
    ("half a step", lambda: solve(DENSE, np.ones(4), damping=1.0, maxiter=0.5), ValueError, "maxiter is 0.5"),
    (
        "a preconditioner of another size",
        lambda: solve(DENSE, np.ones(4), damping=1.0, preconditioner=aslinearoperator(np.eye(3))),
        ValueError,
        "preconditioner has shape (3, 3)",
    ),
    (
        "a preconditioner that is indefinite",
        lambda: solve(DENSE, np.ones(4), damping=1.0, preconditioner=-1.0 * DENSE, progress=False),
        ValueError,
        "preconditioner is not positive definite",
    ),
    ("a rank of 0", lambda: preconditioner.nystrom(DENSE, 0, 1.0), ValueError, "rank is 0"),
    ("a rank in other words", lambda: preconditioner.nystrom(DENSE, "all", 1.0), ValueError, "rank is 'all'"),
    ("a rank that is no number", lambda: preconditioner.nystrom(DENSE, 1.5, 1.0), ValueError, "rank is 1.5"),
    ("no damping for a preconditioner", lambda: preconditioner.nystrom(DENSE, 2, 0.0), ValueError, "damping is 0.0"),
    (
        "an indefinite matrix to precondition",
        lambda: preconditioner.nystrom(INDEFINITE, 3, 1.0, rng=0),
        ValueError,
        "A is indefinite",
    ),
    (
        "a complex matrix to precondition",
        lambda: preconditioner.nystrom(COMPLEX, 2, 1.0),
        TypeError,
        "A has dtype complex128",
    ),
    (
        "no matrix to precondition",
        lambda: preconditioner.nystrom(3, 2, 1.0),
        TypeError,
        "A is a int",
    ),
)
area(
    "Selections",
    ("from what is no model", lambda: select(3, "*"), TypeError, "model is a int"),
    ("a pattern that fits nothing", lambda: select(MODEL, "encoder*"), ValueError, "patterns has 'encoder*'"),
    ("a pattern that is a number", lambda: select(MODEL, 3), TypeError, "patterns is 3"),
    ("a type in words", lambda: select(MODEL, "*", types="Linear"), TypeError, "types is ("),
    ("a type that the model lacks", lambda: select(MODEL, "*", types=nn.Conv2d), ValueError, "types is ("),
    ("everything but everything", lambda: select(MODEL, "*", exclude="*"), ValueError, "no parameter is selected"),
)
area(
    "Eigenvalues and certificates",
    ("none of them", lambda: spectrum.eigsh(DENSE, 0), ValueError, "k is 0"),
    ("more than there are", lambda: spectrum.eigsh(DENSE, 5), ValueError, "k is 5"),
    ("half of one", lambda: spectrum.eigsh(DENSE, 1.5), TypeError, "k is a float"),
    ("another end", lambda: spectrum.eigsh(DENSE, 1, "XX"), ValueError, "which is 'XX'"),
    ("another method", lambda: spectrum.eigsh(DENSE, 1, method="qr"), ValueError, "method is 'qr'"),
    (
        "an end that a method does not find",
        lambda: spectrum.eigsh(DENSE, 1, "LM", method="lobpcg"),
        ValueError,
        "which is 'LM'",
    ),
    ("another side", lambda: spectrum.eigsh(DENSE, 1, side="rows"), ValueError, "side is 'rows'"),
    (
        "the smaller side of a matrix that has none",
        lambda: spectrum.eigsh(DENSE, 1, side="examples"),
        NotFactorableError,
        "A is a MatrixLinearOperator, which has no Gram matrix: pass side='parameters'",
    ),
    (
        "the smaller side of a Hessian",
        lambda: H.gram(),
        NotFactorableError,
        "a HessianLinearOperator is not of the form S.T @ S: use GGNLinearOperator",
    ),
    (
        "the smallest eigenvalues of the smaller side",
        lambda: spectrum.eigsh(DENSE, 1, "SA", side="examples"),
        ValueError,
        "which is 'SA', but side='examples' supports only 'LA' and 'LM'",
    ),
    ("a negative tolerance", lambda: spectrum.eigsh(DENSE, 1, tol=-1), ValueError, "tol is -1"),
    ("a tolerance in words", lambda: spectrum.eigsh(DENSE, 1, tol="low"), TypeError, "tol is a str"),
    ("a basis that is too small", lambda: spectrum.eigsh(DENSE, 2, ncv=1), ValueError, "ncv is 1"),
    (
        "a block for another method",
        lambda: spectrum.eigsh(DENSE, 1, method="lobpcg", block=2),
        ValueError,
        "block is 2, but method='lobpcg' does not take it",
    ),
    (
        "a basis that is too small for the block",
        lambda: spectrum.eigsh(DENSE, 1, method="lanczos", ncv=3, block=3),
        ValueError,
        "ncv is 3, but must be at least k + block = 4",
    ),
    (
        "a starting vector of another length",
        lambda: spectrum.eigsh(DENSE, 1, v0=np.ones(3)),
        ValueError,
        "v0 has shape",
    ),
    ("a starting vector of zeros", lambda: spectrum.eigsh(DENSE, 1, v0=np.zeros(4)), ValueError, "v0 must be finite"),
    ("a matrix that is not square", lambda: spectrum.eigsh(WIDE, 1), ValueError, "A has shape (3, 4)"),
    ("a complex matrix", lambda: spectrum.eigsh(COMPLEX, 1), TypeError, "A has dtype complex128"),
    ("no matrix", lambda: spectrum.eigsh(3, 1), TypeError, "A is a int"),
    (
        "too little memory",
        lambda: spectrum.eigsh(DENSE, 1, method="lanczos", memory=1, progress=False),
        MemoryError,
        "the matrix of 4 rows",
    ),
    ("negative time", lambda: spectrum.eigsh(DENSE, 1, seconds=-1), ValueError, "seconds is -1"),
    (
        "the smallest of the largest eigenvalues",
        lambda: spectrum.eigsh(DENSE, 1, "LA", progress=False).smallest,
        ValueError,
        "which is 'LA', so the smallest eigenvalue of A need not be in the result: pass which='SA' or 'BE'",
    ),
    (
        "more vectors than values, to certify",
        lambda: spectrum.certify(DENSE, [3.0], np.eye(4)),
        ValueError,
        "values has shape (1,) and vectors (4, 4)",
    ),
    (
        "complex values, to certify",
        lambda: spectrum.certify(DENSE, [3j], np.eye(4)[:, :1]),
        TypeError,
        "values has dtype complex128",
    ),
    (
        "a certificate of no accuracy",
        lambda: spectrum.certify(DENSE, [3.0], np.eye(4)[:, :1], tol=0),
        ValueError,
        "tol is 0",
    ),
    (
        "a number of steps for a thorough search",
        lambda: spectrum.certify(DENSE, [3.0], np.eye(4)[:, :1], thorough=500),
        TypeError,
        "thorough is 500, but must be True or False: pass search=",
    ),
)
area(
    "Functions of matrices",
    ("an unknown function", lambda: spectrum.apply(DENSE, "cos", np.ones(4)), ValueError, "f is 'cos'"),
    ("a number as function", lambda: spectrum.apply(DENSE, 2, np.ones(4)), TypeError, "f is 2"),
    ("a function of torch", lambda: spectrum.apply(DENSE, torch.exp, np.ones(4)), TypeError, "f cannot be applied"),
    (
        "a complex function",
        lambda: spectrum.apply(INDEFINITE, np.emath.log, np.ones(4), progress=False),
        TypeError,
        "f returned values",
    ),
    (
        "the logarithm of an indefinite matrix",
        lambda: spectrum.apply(INDEFINITE, "log", np.ones(4), progress=False),
        ValueError,
        "A has an eigenvalue <= -1",
    ),
    (
        "a vector of another length",
        lambda: spectrum.apply(DENSE, "exp", np.ones(3)),
        ValueError,
        "b has shape (3,)",
    ),
    ("a complex vector", lambda: spectrum.apply(DENSE, "exp", 1j * np.ones(4)), TypeError, "b has dtype complex128"),
    ("a vector with NaN", lambda: spectrum.apply(DENSE, "exp", np.full(4, np.nan)), ValueError, "b is not finite"),
    ("no step", lambda: spectrum.apply(DENSE, "exp", np.ones(4), num_steps=0), ValueError, "num_steps is 0"),
    ("a tolerance of 1", lambda: spectrum.apply(DENSE, "exp", np.ones(4), rtol=1), ValueError, "rtol is 1"),
    ("a matrix that is not square", lambda: spectrum.apply(WIDE, "exp", np.ones(4)), ValueError, "A has shape (3, 4)"),
    (
        "a matrix that is not symmetric",
        lambda: spectrum.apply(np.triu(np.ones((4, 4))), "exp", np.ones(4)),
        ValueError,
        "A is not symmetric",
    ),
    (
        "a result that overflows",
        lambda: spectrum.apply(20 * np.eye(4), "exp", np.ones(4, np.float16), progress=False),
        ValueError,
        "f(A) b overflows float16",
    ),
    (
        "too little memory",
        lambda: spectrum.apply(DENSE, "exp", np.ones(4), memory=1),
        MemoryError,
        "the Lanczos basis of one column of b",
    ),
)
area(
    "Spectra",
    ("no probe", lambda: spectrum.density(DENSE, num_probes=0), ValueError, "num_probes is 0"),
    ("half a step", lambda: spectrum.density(DENSE, num_steps=0.5), ValueError, "num_steps is 0.5"),
    ("deflating everything", lambda: spectrum.density(DENSE, deflate=4), ValueError, "deflate is 4"),
    ("a matrix that is not square", lambda: spectrum.density(WIDE), ValueError, "A has shape (3, 4)"),
    ("a seed in words", lambda: spectrum.density(DENSE, rng="x", progress=False), TypeError, "rng is 'x'"),
    ("a checkpoint that is a file", checkpoint_in_a_file, ValueError, "checkpoint is DIRECTORY/file"),
    ("the checkpoint of something else", checkpoint_of_something_else, OtherProblemError, "rng differs"),
    ("more than all of a density", lambda: DENSITY.quantile(1.5), ValueError, "shares is 1.5"),
    ("no width", lambda: DENSITY.pdf(np.zeros(1), sigma=0), ValueError, "sigma is 0"),
    (
        "the logarithm of what is negative",
        lambda: spectrum.density(INDEFINITE, rng=0, progress=False).logdet(0.5),
        ValueError,
        "damping is 0.5",
    ),
    ("a trace from one product", lambda: spectrum.trace(DENSE, 1), ValueError, "num_products is 1"),
    (
        "the trace with the keyword of PyHessian",
        lambda: spectrum.trace(H, maxIter=10),
        TypeError,
        "pass num_probes=",
    ),
    ("a trace with two numbers", lambda: spectrum.trace(H, 20, num_probes=5), TypeError, "pass only one"),
    ("a trace of no vector", lambda: spectrum.trace(H, num_probes=0), ValueError, "num_probes is 0"),
    (
        "a density with another name for the number of vectors",
        lambda: spectrum.density(H, num_vecs=4),
        TypeError,
        "density got an unexpected keyword argument 'num_vecs': pass num_probes=",
    ),
    (
        "eigenvalues with the keyword of PyHessian",
        lambda: spectrum.eigsh(H, top_n=3),
        TypeError,
        "eigsh got an unexpected keyword argument 'top_n': pass k=",
    ),
    (
        "eigenvalues with SciPy's return_eigenvectors",
        lambda: spectrum.eigsh(H, return_eigenvectors=False),
        TypeError,
        "leave it out: values, vectors = eigsh(...) returns both",
    ),
    ("a solve with SciPy's M", lambda: solve(H, np.ones(43), 1.0, M=H), TypeError, "pass preconditioner="),
    ("a trace of what is not square", lambda: spectrum.trace(WIDE, 4), ValueError, "A has shape (3, 4)"),
    ("a trace of a complex matrix", lambda: spectrum.trace(COMPLEX, 4), TypeError, "A has dtype complex128"),
    ("a diagonal from half products", lambda: spectrum.diagonal(DENSE, 2.5), ValueError, "num_products is 2.5"),
    ("one number for a diagonal", lambda: float(spectrum.diagonal(DENSE, 4)), TypeError, "an array of shape (4,)"),
    ("the trace as a method", lambda: H.trace(), AttributeError, "call curvop.spectrum.trace(A)"),
    ("eigenvalues as a method", lambda: H.eigs(3), AttributeError, "call curvop.spectrum.eigsh(A, k)"),
    ("no probe, by position", lambda: spectrum.density(DENSE, 0, 64), ValueError, "num_probes is 0"),
    ("blocks of another operator", lambda: spectrum.blocks(DENSE), TypeError, "A is a MatrixLinearOperator"),
    ("no group of blocks", lambda: spectrum.blocks(H, groups={}), ValueError, "groups is empty"),
    ("groups without names", lambda: spectrum.blocks(H, groups=["0.bias"]), TypeError, "groups is a list"),
    (
        "a parameter in two groups",
        lambda: spectrum.blocks(H, groups={"a": "0.bias", "b": ["0.bias"]}),
        ValueError,
        "groups has '0.bias' twice",
    ),
    (
        "a group with a misspelt name",
        lambda: spectrum.blocks(H, groups={"a": "0.bais"}),
        UnknownNameError,
        "groups['a']: no parameter or module is named '0.bais'",
    ),
    ("tracking every zeroth step", lambda: spectrum.track(DENSE, every=0), ValueError, "every is 0"),
    ("tracking an end that is inside", lambda: spectrum.track(DENSE, which="SM"), ValueError, "which is 'SM'"),
    (
        "tracking with an unknown optimizer",
        lambda: spectrum.track(H, optimizer=torch.optim.NAdam(PARAMS.values())),
        TypeError,
        "optimizer is a NAdam",
    ),
    (
        "tracking with the optimizer of another model",
        lambda: spectrum.track(H, optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1)),
        ValueError,
        "optimizer does not have the parameter '0.weight'",
    ),
    (
        "tracking a matrix without parameters with an optimizer",
        lambda: spectrum.track(DENSE, optimizer=torch.optim.SGD(PARAMS.values(), lr=0.1)),
        TypeError,
        "A is a MatrixLinearOperator",
    ),
    (
        "tracking with a momentum of 1",
        lambda: spectrum.track(H, optimizer=torch.optim.SGD(PARAMS.values(), lr=0.1, momentum=1)),
        ValueError,
        "optimizer has momentum 1",
    ),
    ("tracking what is not square", lambda: spectrum.track(WIDE), ValueError, "A has shape (3, 4)"),
    (
        "tracking what is not symmetric",
        lambda: spectrum.track(np.triu(np.ones((4, 4)))).step(),
        ValueError,
        "A is not symmetric",
    ),
    ("tracking what is no matrix", lambda: spectrum.track(3), TypeError, "A is a int"),
    (
        "a negative step number",
        lambda: spectrum.track(DENSE).step(-1),
        ValueError,
        "number is -1, but must be an integer >= 0",
    ),
    (
        "a callback without a mode",
        lambda: callbacks.LightningTracking(H, mode=None),
        ValueError,
        "mode is None, but must be 'eval'",
    ),
    (
        "a callback for an array",
        lambda: callbacks.LightningTracking(np.eye(3), mode="eval"),
        TypeError,
        "operator is a ndarray",
    ),
    (
        "a callback for a Hugging Face trainer without the trainer",
        lambda: callbacks.TransformersTracking(H, H, mode="eval"),
        TypeError,
        "trainer is a HessianLinearOperator",
    ),
    ("checking what is no operator", lambda: check(np.eye(3)), TypeError, "A is a ndarray"),
    ("checking without probes", lambda: check(DENSE, num_probes=0), ValueError, "num_probes is 0"),
)
area(
    "Plots",
    ("a density without a width", lambda: DENSITY.plot(sigma=0), ValueError, "sigma is 0"),
    ("a kind in the place of the axes", lambda: PAIRS.plot("scree"), TypeError, "ax is a str"),
    ("all axes of a figure", lambda: DENSITY.plot(np.zeros(2)), TypeError, "ax is a ndarray"),
    ("an unknown kind", lambda: PAIRS.plot(kind="histogram"), ValueError, "kind is 'histogram'"),
    ("an unknown property", lambda: DENSITY.plot(line_width=2), TypeError, "line_width"),
    ("a negative rate", lambda: spectrum.track(DENSE).plot(learning_rate=-1), ValueError, "learning_rate is -1"),
)


def served(*operators: Any, **options: Any) -> None:
    with serve(*operators, **options):
        pass


def served_within() -> None:
    with serve(H):
        served(H)


area(
    "Several processes",
    ("serving nothing", lambda: served(), TypeError, "serve() received no operator"),
    ("serving an array", lambda: served(DENSE @ np.eye(4)), TypeError, "A is a ndarray"),
    ("no time at all", lambda: served(H, timeout=0), ValueError, "timeout is 0"),
    ("ranks that come in no time", lambda: served(H, arrival=-1), ValueError, "arrival is -1"),
    ("serving within a block that serves", lambda: served_within(), RuntimeError, "within the block of another serve"),
)
