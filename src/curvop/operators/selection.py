"""Selection of parameters by name pattern and layer type."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from curvop.kernels.errors import UnknownNameError

__all__ = ["LISTING", "parameter_groups", "select", "selected_names"]

#: End of the message of an `UnknownNameError`.
LISTING = " (A.params_slices lists the names)"


def select(
    model: nn.Module,
    patterns: str | Iterable[str] = "*",
    *,
    exclude: str | Iterable[str] = (),
    types: type[nn.Module] | Iterable[type[nn.Module]] | None = None,
) -> dict[str, nn.Parameter]:
    """Return a dict of the parameters of a model that match name patterns and layer types.

    Pass the dict as ``params`` to an operator, or to ``A.block``. If you need only one block of a matrix, it is
    cheapest to select the parameters before you construct the operator. If you need several blocks, use ``A.block``,
    which also accepts names and patterns.

    Parameters
    ----------
    model : nn.Module
        Model that owns the parameters.
    patterns : str or iterable of str, default "*"
        Names of parameters, names of modules, or case-sensitive glob patterns for the names in
        ``model.named_parameters()``. A module stands for all its parameters. In a pattern, ``*`` matches any number of
        characters, including dots. ``?`` matches one character, and ``[01]`` matches one of the characters in brackets.
        A parameter is selected if its name matches at least one pattern.
    exclude : str or iterable of str, default ()
        Names or patterns of the parameters to exclude.
    types : type of nn.Module, or iterable of types, optional
        Layer types, such as ``nn.Linear`` or ``(nn.Conv2d, nn.Linear)``. Only parameters that belong directly to a
        layer of one of these types are selected. If a weight has a parametrization
        (``torch.nn.utils.parametrizations``), it belongs to the parametrization and not to the layer.

    Returns
    -------
    dict of str to nn.Parameter
        Selected parameters by name, in the order of the model. Parameters that do not require grad are omitted. A tied
        parameter is listed once, under the first of its selected names.

    Raises
    ------
    ValueError
        If a name or pattern matches no parameter (the message suggests similar names), if no layer has one of the given
        types, or if no parameter is selected.
    TypeError
        If ``model`` is not a module, if ``types`` contains an object that is not a module type, or if a pattern is not
        a string.

    See Also
    --------
    curvop.HessianLinearOperator.block : Block of an existing operator.

    Examples
    --------
    >>> from torch import nn
    >>> from curvop import select
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    >>> list(select(model, "*.weight", types=nn.Linear))
    ['0.weight', '2.weight']
    >>> list(select(model, exclude="*bias"))
    ['0.weight', '1.weight', '2.weight']

    Construct the Hessian with respect to the weights of the linear layers:

    >>> import torch
    >>> from curvop import HessianLinearOperator
    >>> data = [(torch.randn(8, 2), torch.randn(8, 1))]
    >>> HessianLinearOperator(model, nn.MSELoss(), select(model, "*.weight", types=nn.Linear), data).shape
    (9, 9)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass an nn.Module")
    own = dict(model.named_parameters(remove_duplicate=False))
    names = set().union(*(_matching("patterns", pattern, own) for pattern in _as_patterns("patterns", patterns)))
    for pattern in _as_patterns("exclude", exclude):
        excluded = {id(own[name]) for name in _matching("exclude", pattern, own)}
        names = {name for name in names if id(own[name]) not in excluded}  # excludes all names of a tied parameter
    if types is not None:
        names &= _names_in_layers(model, types)
    selected: dict[str, nn.Parameter] = {}
    for name, parameter in own.items():
        if name in names and parameter.requires_grad and not any(parameter is other for other in selected.values()):
            selected[name] = parameter
    if not selected:
        frozen = f"; {', '.join(sorted(names)[:3])} do not require grad" if names else ""
        raise ValueError(f"no parameter is selected: change patterns, exclude or types{frozen}")
    return selected


def _as_patterns(what: str, patterns: str | Iterable[str]) -> list[str]:
    as_list = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in as_list):
        raise TypeError(
            f"{what} is {patterns!r}, but must be a name pattern, such as 'layer*', or an iterable of patterns"
        )
    return as_list


def _matching(what: str, pattern: str, names: Collection[str]) -> list[str]:
    matching = _matches(pattern, names)
    if not matching:
        near = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.3)
        raise ValueError(
            f"{what} has {pattern!r}, which matches no parameter"
            + (f"; the nearest are {', '.join(map(repr, near))}" if near else _available(list(names)))
        )
    return matching


def _matches(pattern: str, names: Collection[str]) -> list[str]:
    """Return the name that equals a pattern, otherwise the names in the module of this name, or that match the glob."""
    if pattern in names:
        return [pattern]
    inside = [name for name in names if name.startswith(f"{pattern}.")]
    return inside or [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _available(names: list[str]) -> str:
    if not names:
        return ": the model has none"
    return f": they are {', '.join(map(repr, names[:3]))}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _names_in_layers(model: nn.Module, types: type[nn.Module] | Iterable[type[nn.Module]]) -> set[str]:
    types = (types,) if isinstance(types, type) or not isinstance(types, Iterable) else tuple(types)
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in types):
        raise TypeError(f"types is {types}, but must be a module class, such as nn.Linear, or several classes")
    owners = {name: part for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, types)}
    if not owners:
        present = sorted({type(part).__name__ for part in model.modules() if part._parameters})
        raise ValueError(f"types is {types}, but must be among those with parameters: {', '.join(present)}")
    return {f"{prefix}.{name}".lstrip(".") for prefix, part in owners.items() for name in part._parameters}


def selected_names(
    what: str, selected: str | Iterable[str], known: Collection[str], params: Mapping[str, Tensor] | None = None
) -> tuple[str, ...]:
    """Convert names of parameters, names of modules, and glob patterns to a tuple of names of parameters.

    A name in ``known`` selects this parameter, even if it is also the name of a module. The name of a module selects
    all parameters in it, and a pattern selects all parameters that it matches, both in the order of ``known``.

    Parameters
    ----------
    what : str
        Name of the argument in error messages.
    selected : str or iterable of str
        Names and patterns. A dict of names to parameters, such as `select` returns, selects these parameters, which may
        have other names in the operator: those of another module that contains them, or of a tied parameter.
    known : collection of str
        Names of the parameters of the operator.
    params : mapping of str to Tensor, optional
        Parameters of the operator. They are needed to find the parameters in a dict.

    Raises
    ------
    UnknownNameError
        If a name or pattern selects no parameter, or if a parameter in a dict is not a parameter of the operator.
    ValueError
        If no parameter is selected, or if one is selected twice.
    TypeError
        If ``selected`` is not iterable.
    """
    if not isinstance(selected, Iterable):
        raise TypeError(f"{what} is a {type(selected).__name__}: pass the name of a parameter, or a sequence of names")
    names: dict[str, None] = {}
    params = {} if params is None else params
    for pattern in (selected,) if isinstance(selected, str) else selected:
        value = selected[pattern] if isinstance(selected, Mapping) else None
        matches = [name for name in known if value is not None and params.get(name) is value]
        if not matches and isinstance(pattern, str):
            if isinstance(value, nn.Parameter) and isinstance(params.get(pattern), nn.Parameter):
                raise UnknownNameError(
                    f"{what}: {pattern!r} is not the parameter of this name in A, but one of another module: select "
                    "parameters of the same model, or pass a list of their names in A"
                )
            matches = _matches(pattern, known)
        if not matches:
            raise UnknownNameError(_unknown(what, pattern, known))
        if repeated := [name for name in matches if name in names]:
            raise ValueError(f"{what} names {repeated[0]!r} twice: pass it once")
        names.update(dict.fromkeys(matches))
    if not names:
        raise ValueError(f"{what} names no parameter: pass one or more of {', '.join(map(repr, [*known][:10]))}")
    return tuple(names)


def _unknown(what: str, pattern: object, known: Collection[str]) -> str:
    modules = {name[:end] for name in known for end, character in enumerate(name) if character == "."}
    near = difflib.get_close_matches(str(pattern), [*known, *sorted(modules)], n=3, cutoff=0.4)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(map(repr, [*known][:10]))}"
    )
    return f"{what}: no parameter or module is named {pattern!r}; {hint}{LISTING}"


def parameter_groups(
    names: Sequence[str],
    groups: str | Mapping[str, str | Sequence[str]] | None,
    complete: bool = False,
    params: Mapping[str, Tensor] | None = None,
) -> dict[str, list[str]]:
    """Return a dict that maps the name of each group to a list of parameter names.

    Parameters
    ----------
    names : sequence of str
        Names of all parameters.
    groups : mapping of str to str or sequence of str, or "layers", optional
        Names of parameters or modules, or glob patterns. By default, each parameter forms a group. With "layers", the
        parameters that belong directly to a module form a group with the name of the module. A parameter that belongs
        directly to the model forms a separate group.
    complete : bool, default False
        Whether to raise a ``ValueError`` if a parameter is in no group.
    params : mapping of str to Tensor, optional
        Parameters of the operator, as for `selected_names`.
    """
    known = dict.fromkeys(names)
    if groups is None:
        return {name: [name] for name in names}
    if groups == "layers":
        layers: dict[str, list[str]] = {}
        for name in names:
            layer, parametrized, _ = name.partition(".parametrizations.")
            if not parametrized:
                layer, _, _ = name.rpartition(".")
            layer = f"{layer}.*" if layer in known else layer or name  # a parameter may have the name of a module
            layers.setdefault(layer, []).append(name)
        return layers
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"groups is a {type(groups).__name__}: pass a dict of names to parameters, one name or several, or 'layers'"
        )
    if not groups:
        raise ValueError("groups is empty: name parameters, or omit groups to make each parameter a block")
    members = {
        name: list(selected_names(f"groups[{name!r}]", parameters, known, params))
        for name, parameters in groups.items()
    }
    flat = [name for parameters in members.values() for name in parameters]
    if repeated := [name for name in flat if flat.count(name) > 1]:
        raise ValueError(f"groups has {repeated[0]!r} twice: name it in one group only")
    if complete and (missing := [name for name in names if name not in flat]):
        raise ValueError(f"groups lacks {missing[0]!r}: add it to a group, or pass complete=False for rows of zeros")
    return members
