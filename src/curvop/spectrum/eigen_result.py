"""The result of `curvop.spectrum.eigsh`: eigenpairs in ascending order, their certificate, and their files.

`EigenResult` sorts the eigenpairs when it is created. Solvers and files may therefore hold them in any order.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from curvop.operators.summaries import Summary, abridged, text_lines
from curvop.spectrum.certificate import Certificate, with_ranges
from curvop.storage.result_files import arrays_of_record, fields_of_record, load_arrays, save_arrays

__all__ = ["NO_TIME", "EigenResult", "eigenvalue_at_end"]

Array = NDArray[Any]

NO_TIME = "no certificate, as time was up"
"""The note of a result without a certificate. `EigenResult.verdict` searches for it, and saved results contain it."""

_CERTIFICATE_PREFIX = "certificate_"  # names of the certificate's arrays in a saved result
_PER_EIGENPAIR = ("residuals", "bounds", "estimates")  # arrays of a certificate with one entry per eigenpair
_TITLES = {
    "arpack": "ARPACK",
    "lobpcg": "LOBPCG",
    "lanczos": "thick-restart Lanczos",
    "device": "thick-restart Lanczos",  # the old name of "lanczos", in results saved by earlier versions
    "dense": "dense",
}

#: Where to find what people look for under another name.
_ELSEWHERE = {
    "eigenvalues": "values",
    "eigenvectors": "vectors",
    **dict.fromkeys(("bound", "bounds", "error", "errors"), "certificate.bounds"),
    **dict.fromkeys(("residual", "residuals"), "certificate.residuals"),
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EigenResult(Summary):
    """Eigenpairs of a symmetric operator and their certificate, as returned by `eigsh`.

    ``values, vectors = result`` unpacks the eigenpairs. ``print(result)`` shows a table of the eigenvalues, residuals
    and error bounds, followed by the `verdict`.

    Attributes
    ----------
    values : ndarray, shape (n,)
        The eigenvalues in float64, in ascending order for every `which`.
    vectors : ndarray, shape (N, n)
        The eigenvectors, one column per eigenvalue, in the order of `values`.
    certificate : Certificate or None
        The error bounds, in the order of `values`, and the result of the search for missed eigenvalues. None if
        ``certificate=False``, or if no time was left for a certificate.
    converged : bool
        Whether the solver found all `wanted` eigenvalues. If not, 'arpack' returns only the converged eigenpairs, and
        there may be other eigenvalues between the returned eigenvalues. 'lobpcg' and 'lanczos' return all current
        eigenpairs, converged or not.
    products : int
        The number of products, including the products for the certificate. A block product with K columns counts as K
        products.
    method : str
        The method that computed the eigenpairs. It can differ from the requested method (see ``note``).
    which : str
        The argument `which` of `eigsh`.
    wanted : int
        The number of requested eigenvalues, k.
    note : str
        A remark, for example the reason why the method or its settings differ from the request. The string is usually
        empty.
    num_converged : int
        The number of eigenvalues that converged according to the solver.
    timed_out : bool
        Whether time ran out before the solver converged.

    See Also
    --------
    eigsh : Compute eigenpairs.
    Certificate : The error bounds.

    Examples
    --------
    Compute the three largest eigenvalues of a matrix with the eigenvalues 0, 1, ..., 99:

    >>> import numpy as np
    >>> from curvop import spectrum
    >>> result = spectrum.eigsh(np.diag(np.arange(100.0)), 3, "LA", progress=False)
    >>> values, vectors = result
    >>> values.round(6)
    array([97., 98., 99.])
    >>> round(result.largest, 6)
    99.0

    The smallest eigenvalue of the matrix is not in this result:

    >>> result.smallest
    Traceback (most recent call last):
    ...
    ValueError: which is 'LA', so the smallest eigenvalue of A need not be in the result: pass which='SA' or 'BE'
    """

    if not TYPE_CHECKING:  # otherwise, type checkers would accept any attribute

        def __getattr__(self, name: str) -> Any:
            """Raise an ``AttributeError``. Python calls this method only if there is no attribute of this name."""
            if name in _ELSEWHERE:
                raise AttributeError(f"an EigenResult has no attribute {name!r}: use {_ELSEWHERE[name]}")
            return object.__getattribute__(self, name)

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

    def __post_init__(self) -> None:
        order = np.argsort(self.values, kind="stable")
        if (order == np.arange(len(order))).all():
            return
        certificate = self.certificate
        if certificate is not None:
            per_pair = {name: getattr(certificate, name)[order] for name in _PER_EIGENPAIR}
            certificate = dataclasses.replace(certificate, **per_pair)
        self.__dict__.update(values=self.values[order], vectors=self.vectors[:, order], certificate=certificate)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Earlier versions pickled the eigenpairs in another order, and certificates without some attributes.
        if self.certificate is not None:
            self.__dict__["certificate"] = with_ranges(self.certificate, self.values)
        self.__post_init__()

    def __iter__(self) -> Iterator[Array]:
        """Yield `values` and `vectors`, so that a result can be unpacked like that of SciPy's ``eigsh``."""
        yield self.values
        yield self.vectors

    @property
    def largest(self) -> float:
        """The algebraically largest eigenvalue of A.

        The result contains this eigenvalue if `which` is 'LA' or 'BE', if `which` is 'LM' and `values` are not all
        negative, or if the result contains all N eigenvalues. If the solver did not converge, the number may be
        inaccurate, so check `ok` first.

        Raises
        ------
        ValueError
            If the result need not contain the largest eigenvalue of A, because of `which`, because it is empty, or
            because ARPACK did not find all `wanted` eigenvalues. The message says what to pass to `eigsh` instead.
        """
        return self._at_end("largest")

    @property
    def smallest(self) -> float:
        """The algebraically smallest eigenvalue of A.

        The result contains this eigenvalue if `which` is 'SA' or 'BE', if `which` is 'LM' and `values` are not all
        positive, or if the result contains all N eigenvalues. If the solver did not converge, the number may be
        inaccurate, so check `ok` first.

        Raises
        ------
        ValueError
            If the result need not contain the smallest eigenvalue of A, because of `which`, because it is empty, or
            because ARPACK did not find all `wanted` eigenvalues. The message says what to pass to `eigsh` instead.
        """
        return self._at_end("smallest")

    def _at_end(self, end: str) -> float:
        count = len(self.values)
        if not count:
            reason = "time was up: allow more seconds" if self.timed_out else "none converged: increase maxiter or ncv"
            raise ValueError(f"the result contains no eigenvalues, as {reason}")
        if self.method == "arpack" and count < self.wanted:  # the missing eigenvalues can lie anywhere
            raise ValueError(
                f"ARPACK found only {count} of {self.wanted} eigenvalues, so the {end} eigenvalue of A need not be in "
                "the result: increase maxiter or ncv, or decrease k"
            )
        return eigenvalue_at_end(end, self.values, self.which, len(self.vectors))

    @property
    def ok(self) -> bool:
        """Whether the solver converged and the certificate reports no problem. False if there is no certificate."""
        return self.converged and self.certificate is not None and self.certificate.ok

    @property
    def verdict(self) -> str:
        """The verdict of the certificate in one sentence, preceded by a warning if the solver did not converge."""
        if self.certificate is not None:
            text = self.certificate.verdict
        else:
            text = "not certified: " + ("time was up" if NO_TIME in self.note else "no certificate was requested")
        if self.converged:
            return text
        if self.timed_out:
            counts = f"{self.num_converged} of {self.wanted} eigenvalues converged"
            return f"not converged before time was up: {counts}; {text}"
        remedy = "increase maxiter or ncv, or decrease k"
        if self.method != "arpack":
            return f"not converged ({remedy}): {text}"
        text = f"; for those found: {text}" if len(self.values) else ""
        return f"not converged: {len(self.values)} of {self.wanted} eigenvalues found ({remedy}){text}"

    def __str__(self) -> str:
        head, verdict = self._summary_text()
        return "\n".join([head, *text_lines(self._summary_table()), verdict])

    def _summary_text(self) -> tuple[str, str]:
        size, title = len(self.vectors), _TITLES.get(self.method, self.method)
        head = f"{len(self.values)} of {self.wanted} eigenvalues ({self.which}) of a {size:,} x {size:,} matrix"
        note = f" ({self.note})" if self.note else ""
        return f"{head}: {title}, {self.products:,} products{note}", self.verdict

    def _summary_table(self) -> list[Sequence[str]]:
        if not len(self.values):
            return []
        columns = [("eigenvalue", *(f"{value:.8g}" for value in self.values))]
        if self.certificate:
            columns += [
                ("residual", *(f"{residual:.1e}" for residual in self.certificate.residuals)),
                ("error <=", *(f"{bound:.1e}" for bound in self.certificate.bounds)),
            ]
        numbers = ("", *map(str, range(1, len(self.values) + 1)))
        return abridged(list(zip(numbers, *columns, strict=True)))  # the wanted end may be either

    def _draw_summary(self, figure: Any) -> bool:
        figure.set_size_inches(6, 1.6)  # one row of markers
        return len(self.values) > 0 and super()._draw_summary(figure)

    def plot(
        self,
        ax: Any = None,
        kind: str = "spectrum",
        *,
        log: bool = True,
        label: str | None = None,
        color: Any = None,
        **properties: Any,
    ) -> Any:
        """Plot the eigenvalues with the bounds of the certificate as error bars. Requires Matplotlib.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            The axes to draw on. The default is the axes of a new figure.
        kind : {'spectrum', 'scree'}, optional
            With 'spectrum', each eigenvalue is a tick at its place on the horizontal axis. The ticks form a row below
            the upper edge, so the plot can be added to that of a density. With 'scree', the eigenvalues are plotted
            against their index, from the largest down.
        log : bool, optional
            Whether a scree plot shows magnitudes on a logarithmic axis. Negative eigenvalues are then open circles, and
            zeros are not shown. If False, a scree plot shows the values, unless the axis of `ax` is logarithmic
            already. A spectrum ignores this argument.
        label : str, optional
            The name of the result in the legend. The default is the number of eigenvalues and `which`.
        color : color, optional
            The color of the markers and the error bars. The default is the next color of a palette for color-blind
            readers.
        **properties
            Properties of the line that draws the markers, a ``matplotlib.lines.Line2D``, for example ``linestyle="-"``.

        Returns
        -------
        matplotlib.axes.Axes
            The axes.

        Raises
        ------
        ImportError
            If Matplotlib is not installed.
        TypeError, ValueError
            If `kind` is unknown, if the result contains no eigenvalues, if `ax` is not a Matplotlib Axes, or if a
            property is invalid.
        """
        from curvop.spectrum.plots import plot_eigenvalues

        return plot_eigenvalues(self, ax, kind, log=log, label=label, color=color, **properties)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to an ``.npz`` file of plain arrays.

        An interrupted save leaves no partial file at `path`.

        Parameters
        ----------
        path : str or os.PathLike
            The file name, including its suffix. An existing file is replaced.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist. Saving creates no folders.

        See Also
        --------
        load : Read a result from a file.
        """
        arrays = arrays_of_record(self, "")
        if self.certificate is not None:
            arrays |= arrays_of_record(self.certificate, _CERTIFICATE_PREFIX)
        save_arrays(Path(path), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a result that `save` wrote.

        Parameters
        ----------
        path : str or os.PathLike
            The file name.

        Returns
        -------
        EigenResult
            The result, including the certificate if one was saved.

        Raises
        ------
        ValueError
            If the file was not written by `save`.

        See Also
        --------
        save : Write a result to a file.
        """
        file = load_arrays(path, ("values", "vectors", "wanted"), "EigenResult.save")
        prefix = _CERTIFICATE_PREFIX
        own = {name: file[name] for name in file if not name.startswith(prefix)}
        certified = {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}
        fields = fields_of_record(Certificate, certified)
        certificate = with_ranges(Certificate(**fields), file["values"]) if certified else None
        return cls(**{**fields_of_record(cls, own), "certificate": certificate})


def eigenvalue_at_end(end: str, values: Array, which: str, size: int) -> float:
    """Return the largest or smallest eigenvalue of a matrix, if it must be among some computed eigenvalues.

    Parameters
    ----------
    end : {'largest', 'smallest'}
        The end of the spectrum.
    values : ndarray, shape (n,)
        The computed eigenvalues. n is at least 1.
    which : str
        Which eigenvalues these are, as in `curvop.spectrum.eigsh`.
    size : int
        The number of eigenvalues of the matrix.

    Raises
    ------
    ValueError
        If the eigenvalue need not be among `values`. The message says which `which` to pass.
    """
    largest = end == "largest"
    value = float(values.max() if largest else values.min())
    # If `which` is 'LM', all other eigenvalues are at most as large in magnitude as those in `values`. Therefore, none
    # of them is larger than a value that is positive or zero, or smaller than a value that is negative or zero.
    found = {
        "LA": largest,
        "SA": not largest,
        "LM": value >= 0 if largest else value <= 0,
        "BE": largest or len(values) > 1,  # a single value is from the upper end
    }
    if len(values) == size or found.get(which, False):
        return value
    signs = f" and all values are {'negative' if largest else 'positive'}" if which == "LM" else ""
    remedy = "'LA' or 'BE'" if largest else "'SA' or 'BE'"
    raise ValueError(
        f"which is {which!r}{signs}, so the {end} eigenvalue of A need not be in the result: pass which={remedy}"
    )
