"""Groups of parameters, and the blocks that they span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from curvop.operators.parameter_operator import ParameterLinearOperator

__all__ = ["block_of", "listed_groups"]


def block_of(A: ParameterLinearOperator, name: str, own: list[str]) -> ParameterLinearOperator:
    """Return the diagonal block of a group's parameters; an error names the group."""
    try:
        return A.block(own)
    except (TypeError, ValueError) as error:  # the operator calls this argument 'rows'
        raise type(error)(f"groups[{name!r}]{str(error).removeprefix('rows')}") from None


def listed_groups(groups: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    """Return the parameters of each group as lists, each of them in one group only."""
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups is a {type(groups).__name__}: pass a dict of names to parameters, one name or several")
    if not groups:
        raise ValueError("groups is empty: name parameters, or leave it out for a block of each")
    listed = {name: [own] if isinstance(own, str) else list(own) for name, own in groups.items()}
    everything = [name for own in listed.values() for name in own]
    if twice := [name for name in everything if everything.count(name) > 1]:
        raise ValueError(f"groups has {twice[0]!r} twice: leave it out of one of them")
    return listed
