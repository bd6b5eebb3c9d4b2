"""Load a problem, and create operators for it.

A problem is a dictionary with the arguments that most operators need: ``model``, ``loss_function``, ``params`` and
``data``. The problem `digits` is built in. For all other problems, the user provides a function that returns the
dictionary.
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
from curvop.operators.jacobian import JacobianLinearOperator
from curvop.operators.kfac import EKFACLinearOperator, KFACLinearOperator
from curvop.operators.selection import LISTING
from curvop.testing.functorch_reference import functorch_empirical_fisher, functorch_ggn, functorch_hessian

__all__ = [
    "APPROXIMATIONS",
    "MATRICES",
    "Matrix",
    "ProblemError",
    "digits",
    "last_layer",
    "load",
    "moved",
    "title_of",
    "wrap",
    "wrap_approximation",
    "wrap_jacobian",
]

_KEYS = ("model", "loss_function", "params", "data")
_FORMS = "'digits', 'path/to/file.py:function' or 'package.module:function'"


class ProblemError(ValueError):
    """Raised if a problem cannot be loaded or evaluated. The message is one line."""


def digits(seed: int = 0) -> dict[str, Any]:
    """Train a small network on scikit-learn's handwritten digits.

    Training takes about a second. Use this problem to try an operator or a study before you use your own model.

    Parameters
    ----------
    seed : int, default: 0
        Seed of the initial weights and of the order of the training images. The function neither uses nor changes the
        global random state.

    Returns
    -------
    dict
        ``model``
            A trained 64-32-10 network with tanh, in float64 on the CPU and in evaluation mode.
        ``loss_function``
            The mean cross-entropy.
        ``params``
            All 2,410 parameters, by name.
        ``data``
            The 1,797 images and labels, as two batches of different sizes.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.

    See Also
    --------
    curvop.problems.load : Load a problem by its name on the command line.
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
    """Return a layer with the default initialization of ``nn.Linear``, drawn from `generator`.

    This function is needed because the constructor of ``nn.Linear`` can only use the global random state.
    """
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
    """Train the model with Adam and a cosine schedule, which brings it close to a stationary point of the loss."""
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
    """Load a problem by its name on the command line.

    Parameters
    ----------
    spec : str
        ``'digits'``, ``'path/to/file.py:function'`` or ``'package.module:function'``. The function takes no arguments
        and returns the problem as a dictionary.

    Returns
    -------
    dict
        Keys ``model``, ``loss_function``, ``params`` and ``data``, in this order.

    Raises
    ------
    ProblemError
        If the problem is not found, if the function fails, or if it does not return a valid problem.

    See Also
    --------
    curvop.problems.digits : The built-in problem.

    Notes
    -----
    The folder of the file (for a module, the current directory) is added to ``sys.path``, as Python does for a script.
    The folder is not removed afterwards, because models and data may import other modules later.
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


def moved(problem: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the model, the loss function and the parameters of a problem to a device.

    Modules are moved in place. Operators move each batch of the data.

    Parameters
    ----------
    problem : dict
        The problem, as returned by `load`.
    device : torch.device
        The device.

    Returns
    -------
    dict
        The problem on the device.
    """
    device = torch.empty(0, device=device).device  # tensors have an index: cuda:0, not cuda
    model = problem["model"]
    names = {id(param): name for name, param in _own(model).items()}
    for part in (model, problem["loss_function"]):
        if isinstance(part, nn.Module):
            part.to(device)
    own = _own(model)  # depending on the device, the modules have new parameters

    def move(value: Any) -> Any:
        if id(value) in names:
            return own[names[id(value)]]
        if not isinstance(value, Tensor):
            return value  # operators refuse it
        return value.detach().to(device).requires_grad_(value.requires_grad)

    params = problem["params"]
    if isinstance(params, Mapping):
        return problem | {"params": {name: move(value) for name, value in params.items()}}
    return problem | {"params": [move(value) for value in params]}


def _own(model: Any) -> dict[str, Any]:
    """Return the parameters of a model by name. The dictionary is empty if the model is a function."""
    return dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}


def last_layer(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all parameters of the last layer, which is the layer of the last parameter."""
    module = names[-1].rpartition(".")[0]
    return tuple(name for name in names if name.rpartition(".")[0] == module)


def _nearest(name: str, candidates: Iterable[str]) -> str:
    """Return a hint that names the most similar candidate. If no candidate is similar, return an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.4)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _load_file(path: Path) -> ModuleType:
    """Execute a Python file as a module."""
    if not path.is_file():
        siblings = (sibling.name for sibling in path.parent.glob("*.py"))
        raise ProblemError(f"no file {str(path)!r}{_nearest(path.name, siblings)}")
    path = path.resolve()
    # Name the module after the file, so that the worker processes of a DataLoader can import its classes. If a
    # different module of this name is already loaded, add a prefix.
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
        # If the missing module is not the requested one, the requested module was found, but one of its imports failed.
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ProblemError(f"no module named {name!r}; a problem is {_FORMS}") from error
        raise ProblemError(f"importing {name!r} failed: {describe_error(error)}") from error
    except (Exception, SystemExit) as error:
        raise ProblemError(f"importing {name!r} failed: {describe_error(error)}") from error


def _make_importable(folder: Path) -> None:
    """Insert a folder at the beginning of ``sys.path``, unless ``sys.path`` already contains the folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    # Python caches folder listings. Clear the caches to find new files.
    importlib.invalidate_caches()


def _find_function(module: ModuleType, name: str, source: str) -> Callable[..., object]:
    """Return the function called `name` in a module."""
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
    """Check the keys of a user's problem, and return the problem as a dictionary. Operators check its values."""
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
    if isinstance(checked["params"], Iterator):  # model.parameters() can be read only once
        checked["params"] = list(checked["params"])
    return checked


@dataclass(frozen=True)
class Matrix:
    """A symmetric curvature matrix: title in reports, class of the operator, and function for the dense matrix."""

    title: str
    operator: Callable[..., Any]
    dense: Callable[..., Tensor]


MATRICES = {
    "hessian": Matrix("Hessian", HessianLinearOperator, functorch_hessian),
    "ggn": Matrix("Gauss-Newton matrix", GGNLinearOperator, functorch_ggn),
    "ef": Matrix("empirical Fisher matrix", EFLinearOperator, functorch_empirical_fisher),
    # For the likelihoods that FisherLinearOperator accepts, the Fisher matrix equals the Gauss-Newton matrix.
    "fisher": Matrix("Fisher matrix", FisherLinearOperator, functorch_ggn),
}
"""The choices of ``--matrix`` that are matrices of second derivatives or of gradients."""

APPROXIMATIONS = {
    "kfac": ("KFAC of the Gauss-Newton matrix", KFACLinearOperator),
    "ekfac": ("EKFAC of the Gauss-Newton matrix", EKFACLinearOperator),
}
"""Titles and classes of the approximations that ``--matrix`` accepts."""


def title_of(matrix: str) -> str:
    """Return the title of a matrix in reports."""
    if matrix == "jacobian":
        return "Jacobian"
    return APPROXIMATIONS[matrix][0] if matrix in APPROXIMATIONS else MATRICES[matrix].title


def wrap(
    problem: dict[str, Any], matrix: str, settings: dict[str, Any], block: Sequence[str] | None, progress: Any = False
) -> tuple[Any, Any]:
    """Create the operators for the matrix of a problem and for a block of this matrix.

    Parameters
    ----------
    problem : dict
        The problem, as returned by `load`.
    matrix : str
        A key of `MATRICES`.
    settings : dict
        ``dtype``, ``engine`` and ``columns`` of the operator.
    block : sequence of str or None
        Names of the parameters of the block. If None, `part` is `whole`.
    progress : bool or tqdm.tqdm
        Argument `progress` for the operator.

    Returns
    -------
    whole, part : EngineLinearOperator
        The operator for all parameters, and the operator for the parameters in `block`.

    Raises
    ------
    ProblemError
        If the problem is invalid, or if `block` contains an unknown name.
    """
    try:
        whole = MATRICES[matrix].operator(**problem, **settings, progress=progress)
    except (ValueError, TypeError) as error:
        raise ProblemError(one_line(error)) from error
    return whole, _restricted(whole, block, "rows")


def wrap_approximation(
    problem: dict[str, Any], matrix: str, settings: dict[str, Any], block: Sequence[str] | None
) -> tuple[Any, Any, Any]:
    """Create the operators for an approximation of a matrix of a problem, and for the exact matrix.

    Parameters
    ----------
    problem : dict
        The problem, as returned by `load`.
    matrix : str
        A key of `APPROXIMATIONS`.
    settings : dict
        ``dtype`` of the operator. Other settings are ignored.
    block : sequence of str or None
        Names of the parameters of the block. If None, `part` is `whole`.

    Returns
    -------
    whole, part : LinearOperator
        The approximation for all parameters, and for the parameters in `block`.
    exact : EngineLinearOperator
        The exact matrix for the parameters in `block`.

    Raises
    ------
    ProblemError
        If the problem is invalid or cannot be evaluated, or if `block` contains an unknown name.
    """
    try:
        whole = APPROXIMATIONS[matrix][1](**problem, dtype=settings["dtype"])
    except Exception as error:  # the constructor runs the model
        raise ProblemError(one_line(error)) from error
    return whole, _restricted(whole, block, "rows"), _restricted(whole.exact, block, "rows")


def wrap_jacobian(
    problem: dict[str, Any], settings: dict[str, Any], block: Sequence[str] | None, progress: Any = False
) -> tuple[Any, Any]:
    """Create the operators for the Jacobian of a problem's predictions and for a block of its columns.

    Parameters
    ----------
    problem : dict
        The problem, as returned by `load`.
    settings : dict
        ``dtype``, ``engine`` and ``columns`` of the operator.
    block : sequence of str or None
        Names of the parameters whose columns form the block. If None, `part` is `whole`.
    progress : bool or tqdm.tqdm
        Argument `progress` for the operator.

    Returns
    -------
    whole, part : JacobianLinearOperator
        The operator for all parameters, and the operator for the parameters in `block`.

    Raises
    ------
    ProblemError
        If the problem is invalid, or if `block` contains an unknown name.
    """
    try:
        whole = JacobianLinearOperator(
            problem["model"], problem["params"], problem["data"], **settings, progress=progress
        )
    except Exception as error:  # unlike other operators, a Jacobian runs the model to determine its shape
        raise ProblemError(one_line(error)) from error
    return whole, _restricted(whole, block, "params")


def _restricted(whole: Any, block: Sequence[str] | None, argument: str) -> Any:
    """Return a block of an operator, or the whole operator if `block` is None.

    Error messages of ``whole.block`` begin with `argument`, the name of its own argument. In these messages,
    ``--block`` replaces the name. The messages of unknown names end with `LISTING`, which is omitted.
    """
    if block is None:
        return whole
    try:
        return whole.block(block)
    except ValueError as error:
        raise ProblemError(
            f"--block: {str(error).removeprefix(argument).removesuffix(LISTING).lstrip(': ')}"
        ) from error
