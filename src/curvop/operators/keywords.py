"""Errors that name the right keyword if a function is called with a keyword of another package."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["named_keywords"]

P = ParamSpec("P")
T = TypeVar("T")

_PROBES = ("num_probes", "num_products")
_PRODUCTS = ("num_products", "num_steps", "maxiter")
_STEPS = ("num_steps", "ncv", "maxiter")
_ITERATIONS = ("maxiter", "num_steps", "num_probes", "num_products")

#: Maps keywords of other packages to keywords of this package. The first one that the function has is suggested.
_RENAMED = {
    # Constructors of curvlinops, PyHessian and hessian-eigenthings.
    "model_func": ("model",),
    "loss_func": ("loss_function",),
    "loss_fn": ("loss_function",),
    "criterion": ("loss_function",),
    "loss": ("loss_function",),
    "dataloader": ("data",),
    "param_filter": ("params",),
    "batch_size_fn": ("batch_weight",),
    "fisher_type": ("fisher",),
    "kfac_approx": ("sharing",),
    "separate_weight_and_bias": ("joint_bias",),
    # Any function.
    "progressbar": ("progress",),
    "verbose": ("progress",),
    "seed": ("rng",),
    "key": ("rng",),
    "random_state": ("rng",),
    # Random vectors: PyHessian's n_v, hessian-eigenthings' num_runs, curvlinops' num_repeats, matfree's num_samples.
    "num_probes": _PROBES,
    "num_vecs": _PROBES,
    "num_vectors": _PROBES,
    "num_samples": _PROBES,
    "num_runs": _PROBES,
    "num_repeats": _PROBES,
    "n_v": _PROBES,
    "n_samples": _PROBES,
    "num_matvecs": _PRODUCTS,
    # Lengths of iterations: SciPy's maxiter, PyHessian's maxIter and iter, hessian-eigenthings' lanczos_steps.
    "maxiter": _ITERATIONS,
    "maxIter": _ITERATIONS,
    "max_iter": _ITERATIONS,
    "max_iters": _ITERATIONS,
    "n_iter": _ITERATIONS,
    "niter": _ITERATIONS,
    "num_iters": _ITERATIONS,
    "iter": _ITERATIONS,
    "power_iter_steps": _ITERATIONS,
    "lanczos_steps": _STEPS,
    "num_lanczos_steps": _STEPS,
    "ncv": _STEPS,
    "order": _STEPS,
    # Eigenvalues: PyHessian's top_n, hessian-eigenthings' num_eigenthings.
    "k": ("deflate",),
    "top_n": ("k", "deflate"),
    "num_eigenthings": ("k", "deflate"),
    "num_eigs": ("k", "deflate"),
    "n_components": ("k",),
    "largest": ("which",),
    "mode": ("method",),
    # Tolerances and linear systems of SciPy and curvlinops.
    "tol": ("rtol",),
    "rtol": ("tol",),
    "eps": ("rtol", "tol"),
    "tolerance": ("rtol", "tol"),
    "power_iter_err_threshold": ("tol",),
    "M": ("preconditioner",),
    "precond": ("preconditioner",),
    "damp": ("damping",),
    "lam": ("damping",),
    "shift": ("damping",),
    "x0": ("v0",),
    "v0": ("x0",),
}

#: What to say in addition about a keyword in `_RENAMED`.
_HINTS = {
    "batch_size_fn": ", a function of the whole batch; the losses of torch.nn need none",
    "separate_weight_and_bias": ", which has the opposite meaning",
    "param_filter": ", for example the dict that curvop.select(model, patterns) returns",
    "largest": ", 'LA' for the largest eigenvalues or 'SA' for the smallest",
    "k": ", the number of eigenvalues to compute individually",
    "shift": ", which has the opposite sign: SciPy subtracts shift * I, and damping * I is added",
    "damp": ", which is added to the matrix and is not squared",
}

_FISHER = "use FisherLinearOperator(..., mc_samples=, rng=) for a matrix with sampled targets"
_ERROR_BAR = "leave it out: the result has an error bar, which decreases with the number of products"
_DEVICE = "leave it out: products are computed on the device of the parameters"

#: Maps keywords of other packages that have no equivalent in this package to pieces of advice. Each applies to the
#: functions that have the keyword before it, and the advice of ``""`` to all functions.
_NOT_NEEDED = {
    "batch_size_fn": {"data": "leave it out: nothing is weighted here"},
    "num_data": {"data": "leave it out: batches are weighted by the loss's own divisor"},
    "num_per_example_loss_terms": {"data": "leave it out: batches are weighted by the loss's own divisor"},
    "check_deterministic": {
        "data": "leave it out: products check this at no extra cost, and curvop.check(A) checks more"
    },
    "block_sizes": {"": "use A.block(names) for one block, or A.blocks() for the blocks of all parameters"},
    "fisher_type": {"data": "use GGNLinearOperator, EFLinearOperator or FisherLinearOperator"},
    "mc_samples": {"data": _FISHER},
    "seed": {"data": _FISHER},
    "tol": {"num_products": _ERROR_BAR, "num_steps": _ERROR_BAR},
    "rtol": {"num_products": _ERROR_BAR, "num_steps": _ERROR_BAR},
    "distribution": {"rng": "leave it out: the distribution of the random vectors is fixed"},
    "return_eigenvectors": {"ncv": "leave it out: values, vectors = eigsh(...) returns both"},
    "sigma": {
        "ncv": "leave it out: eigenvalues inside the spectrum need a factorization; use which='LA', 'SA', 'LM' or 'BE'",
        "deflate": "pass it to the method pdf or plot of the density",
    },
    "device": {"": _DEVICE},
    "cuda": {"": _DEVICE},
    "use_gpu": {"": _DEVICE},
}


def named_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function or a constructor so that wrong arguments raise helpful errors. The signature is unchanged.

    If an argument of a constructor is wrong, the error message names the class that the user called. Python's own
    message would name the class that defines ``__init__``, which may be a base class. For an unknown keyword, the
    message suggests the most similar keyword. For a keyword of another package, the message explains what to use
    instead.
    """
    signature = inspect.signature(function)
    bound = next(iter(signature.parameters)) in ("self", "cls")
    known = list(signature.parameters)[bound:]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                callee = _callee(function, args[0]) if bound else function.__name__
                raise TypeError(f"{callee} got an unexpected keyword argument {name!r}: {_remedy(name, known)}")
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            callee = _callee(function, args[0]) if bound else function.__name__
            raise TypeError(f"{callee}: {error}; pass {', '.join(known)}") from None
        return function(*args, **kwargs)

    return checked


def _callee(function: Callable[..., Any], owner: Any) -> str:
    """Return the name of the class or class method that the user called."""
    return f"{owner.__name__}.{function.__name__}" if isinstance(owner, type) else type(owner).__name__


def _remedy(name: str, known: list[str]) -> str:
    if (ours := next((ours for ours in _RENAMED.get(name, ()) if ours in known), None)) is not None:
        return f"pass {ours}={_HINTS.get(name, '')}"
    for keyword, advice in _NOT_NEEDED.get(name, {}).items():
        if keyword in ("", *known):
            return advice
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]}=?"
    return f"known are {', '.join(known)}"
