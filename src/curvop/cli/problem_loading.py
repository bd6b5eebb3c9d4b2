"""Problems to study: the built-in digits classifier, and a user's own, named on the command line.

A problem is a dictionary with the four things that every operator of this package is built from: ``model``,
``loss_function``, ``params`` and ``data``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from curvop.operators.error_text import describe_error, one_line
from curvop.operators.fisher import EFLinearOperator, FisherLinearOperator
from curvop.operators.ggn import GGNLinearOperator
from curvop.operators.hessian import HessianLinearOperator
from curvop.testing.functorch_reference import functorch_empirical_fisher, functorch_ggn, functorch_hessian

__all__ = ["MATRICES", "Matrix", "ProblemError", "digits", "last_layer", "load", "wrap"]

_KEYS = ("model", "loss_function", "params", "data")
_FORMS = "'digits', 'path/to/file.py:function' or 'package.module:function'"


class ProblemError(ValueError):
    """A problem that cannot be loaded or evaluated; its message is one line."""


def digits(seed: int = 0) -> dict[str, Any]:
    """Train a small network on scikit-learn's handwritten digits.

    Parameters
    ----------
    seed : int, optional
        Fixes the initial weights and the order of the training images. The global random state is neither used nor
        changed.

    Returns
    -------
    dict
        ``model``, a trained 64-32-10 network with tanh in double precision on the CPU; ``loss_function``, the mean
        cross-entropy; ``params``, all 2,410 parameters; ``data``, the 1,797 images of the training set as two
        unequal batches.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits problem needs scikit-learn: pip install "curvop[demo]"') from error

    pixels, labels = load_digits(return_X_y=True)
    inputs, targets = torch.from_numpy(pixels / 16.0), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(_linear(64, 32, generator), nn.Tanh(), _linear(32, 10, generator))
    loss_function = nn.CrossEntropyLoss()
    _train(model, loss_function, inputs, targets, generator)
    return {
        "model": model,
        "loss_function": loss_function,
        "params": dict(model.named_parameters()),
        "data": list(zip(inputs.split(1000), targets.split(1000), strict=True)),
    }


def _linear(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Linear:
    """Initialise a layer as ``nn.Linear`` does, but from a generator: its constructor knows only the global state."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=torch.float64)
    bound = 1.0 / math.sqrt(fan_in)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def _train(
    model: nn.Module,
    loss_function: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    generator: torch.Generator,
    *,
    epochs: int = 40,
    batch_size: int = 128,
) -> None:
    """Train with Adam, the learning rate falling along a cosine so that the run ends near a stationary point."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss_function(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        scheduler.step()
    model.zero_grad()
    model.eval()


def load(spec: str) -> dict[str, Any]:
    """Load a problem by name.

    Parameters
    ----------
    spec : str
        ``'digits'``, ``'path/to/file.py:function'`` or ``'package.module:function'``. The function is called
        without arguments and returns the problem's dictionary. As for a script, the file's own folder can be
        imported from (the current directory for a module) and stays so, because models and data may import late.

    Returns
    -------
    dict
        With the keys ``model``, ``loss_function``, ``params`` and ``data``, in this order.

    Raises
    ------
    ProblemError
        If there is no such problem, if it fails, or if it returns something else.
    """
    if spec == "digits":
        try:
            return digits()
        except ImportError as error:
            raise ProblemError(str(error)) from error
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        hint = _nearest(spec, ["digits"]) or (
            f" (name its function: '{spec}:function')" if spec.endswith(".py") else ""
        )
        raise ProblemError(f"no problem {spec!r}{hint}; a problem is {_FORMS}")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    problem = _call(_find_function(module, name, source), spec)
    return _validated(problem, spec)


def last_layer(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the parameters in the same module as the last one."""
    module = names[-1].rpartition(".")[0]
    return tuple(name for name in names if name.rpartition(".")[0] == module)


def _nearest(name: str, candidates: Iterable[str]) -> str:
    """Return a remark that names the most similar candidate, empty where none is similar."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.4)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _load_file(path: Path) -> ModuleType:
    """Execute a Python file as a module."""
    if not path.is_file():
        siblings = (sibling.name for sibling in path.parent.glob("*.py"))
        raise ProblemError(f"no file {str(path)!r}{_nearest(path.name, siblings)}")
    path = path.resolve()
    # Under its own name, a class of the file can be pickled for the worker processes of a DataLoader; another
    # module that is loaded already must not be replaced.
    taken = sys.modules.get(path.stem)
    name = path.stem if taken is None or getattr(taken, "__file__", None) == str(path) else f"curvop_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ProblemError(f"cannot import {str(path)!r}")
    module = importlib.util.module_from_spec(module_spec)
    _make_importable(path.parent)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ProblemError(f"importing {str(path)!r} failed: {describe_error(error)}") from error
    return module


def _load_module(name: str) -> ModuleType:
    """Import a module by its dotted name."""
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only where the module itself is missing; one that it imports in vain is the next case.
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ProblemError(f"no module named {name!r}; a problem is {_FORMS}") from error
        raise ProblemError(f"importing {name!r} failed: {describe_error(error)}") from error
    except (Exception, SystemExit) as error:
        raise ProblemError(f"importing {name!r} failed: {describe_error(error)}") from error


def _make_importable(folder: Path) -> None:
    """Put a folder first on the import path."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    # A module written since the folder was last listed must be seen.
    importlib.invalidate_caches()


def _find_function(module: ModuleType, name: str, source: str) -> Callable[..., object]:
    """Return the function called `name` of a module."""
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ProblemError(f"no function {name!r} in {source!r}{_nearest(name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise ProblemError(
            f"{name!r} in {source!r} is not a function but of type {type(function).__name__}: name a function"
        )
    checked: Callable[..., object] = function
    return checked


def _call(function: Callable[..., object], spec: str) -> object:
    """Call a user's function without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ProblemError(f"{spec!r} must be callable without arguments: {one_line(error)}") from error
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ProblemError(f"{spec!r} failed: {describe_error(error)}") from error


def _validated(problem: object, spec: str) -> dict[str, Any]:
    """Check the keys of what a user's function returned; the values are the operators' to check."""
    expected = "it must be a dict with the keys " + ", ".join(_KEYS)
    if not isinstance(problem, Mapping):
        raise ProblemError(f"{spec!r} returned an object of type {type(problem).__name__}; {expected}")
    unknown = [key for key in problem if key not in _KEYS]
    if unknown:
        hint = _nearest(str(unknown[0]), (key for key in _KEYS if key not in problem))
        raise ProblemError(f"{spec!r} returned the unknown key {unknown[0]!r}{hint}; {expected}")
    missing = [key for key in _KEYS if key not in problem]
    if missing:
        remedy = "; for all parameters: params=dict(model.named_parameters())" if missing == ["params"] else ""
        raise ProblemError(f"{spec!r} returned no {missing[0]!r}{remedy}; {expected}")
    checked = {key: problem[key] for key in _KEYS}
    if isinstance(checked["params"], Iterator):  # model.parameters(): more than one reader is to come
        checked["params"] = list(checked["params"])
    return checked


# The symmetric curvature matrices by name, each with the dense reference that it is checked against.


@dataclass(frozen=True)
class Matrix:
    """A kind of matrix: what it is called, its operator, and how it is formed."""

    title: str
    operator: Callable[..., Any]
    dense: Callable[..., Tensor]


MATRICES = {
    "hessian": Matrix("Hessian", HessianLinearOperator, functorch_hessian),
    "ggn": Matrix("Gauss-Newton matrix", GGNLinearOperator, functorch_ggn),
    "ef": Matrix("empirical Fisher matrix", EFLinearOperator, functorch_empirical_fisher),
    "fisher": Matrix("Fisher matrix", FisherLinearOperator, functorch_ggn),  # equal for the likelihoods that it takes
}


def wrap(
    problem: dict[str, Any], matrix: str, settings: dict[str, Any], block: Sequence[str] | None, progress: Any = False
) -> tuple[Any, Any]:
    """Return the operators of a problem's matrix, and of the part of it that `block` names.

    Raises
    ------
    ProblemError
        If the problem cannot be wrapped.
    """
    try:
        whole = MATRICES[matrix].operator(**problem, **settings, progress=progress)
    except (ValueError, TypeError) as error:
        raise ProblemError(one_line(error)) from error
    try:
        return whole, whole if block is None else whole.block(block)
    except ValueError as error:  # the operator calls this argument 'rows'
        raise ProblemError(f"--block: {str(error).removeprefix('rows').lstrip(': ')}") from error
