"""Eigenpairs with what is known of them, as `eigsh` returns them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from curvop.cli.results import load_arrays, save_arrays
from curvop.spectrum.certificate import Certificate

__all__ = ["NO_TIME", "EigenResult"]

Array = NDArray[Any]

NO_TIME = "no certificate, as time was up"
"""What a `note` says where that is so."""

_SHOWN = 20
_PREFIX = "certificate_"


@dataclasses.dataclass(frozen=True, eq=False)
class EigenResult:
    """Eigenpairs of a symmetric operator, and what they are worth.

    Attributes
    ----------
    values : ndarray, shape (n,)
        The outermost first; for 'SM' the smallest in magnitude first, for 'BE' in ascending order.
    vectors : ndarray, shape (N, n)
        Their vectors, in this order.
    certificate : Certificate or None
        None where it was not asked for, or time was up.
    converged : bool
        Whether the solver found all that were `wanted`. Where ARPACK did not, those are here that did converge, and
        there may be others between them; those of 'lobpcg' and 'device' are all here, as far as they came.
    products : int
        Columns multiplied with `A`, those of the certificate included.
    method : str
        The one that was used in the end.
    which : str
        As it was asked for.
    wanted : int
        How many were asked for.
    note : str
        What was done other than asked for, and why; empty mostly.
    num_converged : int
        How many of the values the solver takes for converged.
    timed_out : bool
        Whether time was up before the solver was done.
    """

    values: Array
    vectors: Array
    certificate: Certificate | None
    converged: bool
    products: int
    method: str
    which: str
    wanted: int
    note: str = ""
    num_converged: int = 0
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """Whether the solver converged, and the certificate says that nothing is wrong; never without one."""
        return self.converged and self.certificate is not None and self.certificate.ok

    @property
    def verdict(self) -> str:
        """The certificate's, preceded by what the solver says of itself where it did not converge."""
        why = "time was up" if NO_TIME in self.note else "no certificate was asked for"
        text = f"not certified: {why}" if self.certificate is None else self.certificate.verdict
        if self.converged:
            return text
        if self.timed_out:
            return f"not converged, as time was up: {self.num_converged} of {self.wanted} eigenvalues did; {text}"
        remedy = "raise maxiter or ncv, or ask for fewer"
        if self.method != "arpack":
            return f"not converged, {remedy}: {text}"
        text = f"; of these, {text}" if len(self.values) else ""
        return f"not converged: {len(self.values)} of {self.wanted} eigenvalues were found, {remedy}{text}"

    def __str__(self) -> str:
        size, found = len(self.vectors), len(self.values)
        head = f"{found} of {self.wanted} eigenvalues ({self.which}) of a {size:,} x {size:,} matrix"
        lines = [f"{head} by {self.method}, {self.products:,} products" + (f" ({self.note})" if self.note else "")]
        if found:
            lines.append(
                f"{'':>6}{'eigenvalue':>16}" + (f"{'residual':>12}{'error <=':>12}" if self.certificate else "")
            )
        for index in range(min(found, _SHOWN)):
            line = f"{index + 1:>6}{self.values[index]:>16.8g}"
            if self.certificate:
                line += f"{self.certificate.residuals[index]:>12.1e}{self.certificate.bounds[index]:>12.1e}"
            lines.append(line)
        if found > _SHOWN:
            lines.append(f"{'...':>6}")
        return "\n".join([*lines, self.verdict])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to an ``.npz`` file of plain arrays, which appears only when it is complete."""
        arrays = _arrays(self, "")
        if self.certificate is not None:
            arrays |= _arrays(self.certificate, _PREFIX)
        save_arrays(Path(path), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            Where the file is another one.
        """
        file = load_arrays(path, ("values", "vectors", "wanted"), "EigenResult.save")
        own = {name: file[name] for name in file if not name.startswith(_PREFIX)}
        other = {name.removeprefix(_PREFIX): file[name] for name in file if name.startswith(_PREFIX)}
        certificate = Certificate(**_fields(Certificate, other)) if other else None
        return cls(**{**_fields(cls, own), "certificate": certificate})


def _arrays(record: Any, prefix: str) -> dict[str, Array]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {
        prefix + name: np.asarray(value)
        for name, value in values.items()
        if value is not None and not isinstance(value, Certificate)
    }


def _fields(record: Any, arrays: dict[str, Array]) -> dict[str, Any]:
    """Return the fields of a record: arrays as they are, numbers and words as Python's own, None what is not there."""
    names = [field.name for field in dataclasses.fields(record)]
    found = {name: arrays[name] for name in names if name in arrays}
    return dict.fromkeys(names) | {name: array if array.ndim else array.item() for name, array in found.items()}
