"""Choosing parameters by name and by the kind of layer."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

from torch import nn

__all__ = ["select"]


def select(
    model: nn.Module,
    patterns: str | Iterable[str] = "*",
    *,
    exclude: str | Iterable[str] = (),
    types: type[nn.Module] | Iterable[type[nn.Module]] | None = None,
) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` that patterns name, as the dict that the operators take.

    Parameters
    ----------
    model : nn.Module
    patterns : str or iterable of str
        Globs of names as ``model.named_parameters()`` has them, capitals distinguished: ``*`` stands for any
        characters, dots included, ``?`` for one, ``[01]`` for one of those in brackets. A parameter is taken where one
        of them fits.
    exclude : str or iterable of str
        Globs of those to leave out.
    types : type of nn.Module, or iterable of types
        Takes only what belongs directly to layers of one of these types: ``nn.Linear``, ``(nn.Conv2d, nn.Linear)``. A
        weight under ``torch.nn.utils.parametrizations`` belongs to its parametrization.

    Returns
    -------
    dict of str to nn.Parameter
        In the order of the model. Parameters that do not require grad are left out; a tied one stands under its first
        name that is taken.

    Raises
    ------
    ValueError
        For a pattern that fits no name (with near misses), types that no layer has, or where nothing is left.
    TypeError
        For a model that is no module, or types that are none.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    >>> list(select(model, "*.weight", types=nn.Linear))
    ['0.weight', '2.weight']
    >>> list(select(model, exclude="*bias"))
    ['0.weight', '1.weight', '2.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass an nn.Module, whose parameters have names")
    own = dict(model.named_parameters(remove_duplicate=False))
    taken = set().union(*(_fitting("patterns", pattern, own) for pattern in _several("patterns", patterns)))
    for pattern in _several("exclude", exclude):
        left_out = {id(own[name]) for name in _fitting("exclude", pattern, own)}
        taken = {name for name in taken if id(own[name]) not in left_out}  # a tied one under all its names
    if types is not None:
        taken &= _belonging_to(model, types)
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in own.items():
        if name in taken and parameter.requires_grad and not any(parameter is other for other in chosen.values()):
            chosen[name] = parameter
    if not chosen:
        frozen = f"; {', '.join(sorted(taken)[:3])} do not require grad" if taken else ""
        raise ValueError(f"no parameter is selected: patterns, exclude and types leave nothing over{frozen}")
    return chosen


def _several(what: str, patterns: str | Iterable[str]) -> list[str]:
    several = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in several):
        raise TypeError(f"{what} is {patterns!r}, but must be a pattern of names, such as 'layer*', or several")
    return several


def _fitting(what: str, pattern: str, names: Iterable[str]) -> set[str]:
    found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
    if not found:
        near = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.3)
        raise ValueError(
            f"{what} has {pattern!r}, which fits no parameter"
            + (f"; the nearest are {', '.join(map(repr, near))}" if near else _some_of(list(names)))
        )
    return found


def _some_of(names: list[str]) -> str:
    if not names:
        return ": the model has none"
    return f": they are {', '.join(map(repr, names[:3]))}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _belonging_to(model: nn.Module, types: type[nn.Module] | Iterable[type[nn.Module]]) -> set[str]:
    types = (types,) if isinstance(types, type) or not isinstance(types, Iterable) else tuple(types)
    if not all(isinstance(one, type) and issubclass(one, nn.Module) for one in types):
        raise TypeError(f"types is {types}, but must be a class of modules, such as nn.Linear, or several")
    owners = {name: part for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, types)}
    if not owners:
        present = sorted({type(part).__name__ for part in model.modules() if part._parameters})
        raise ValueError(f"types is {types}, but must be among those with parameters: {', '.join(present)}")
    return {f"{prefix}.{name}".lstrip(".") for prefix, part in owners.items() for name in part._parameters}
