"""The report of an operator check, which can be printed as a table or exported for JSON."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

from curvop.operators.summaries import Summary

__all__ = ["NOT_APPLICABLE", "OK", "WARNING", "WRONG", "CheckReport", "Finding"]

OK, WARNING, WRONG, NOT_APPLICABLE = "ok", "warning", "wrong", "not applicable"

_MARKS = {OK: "ok", WARNING: "warning", WRONG: "WRONG", NOT_APPLICABLE: "-"}
_HEADINGS = ("status", "check", "observation", "to do")  # of the table in a notebook


@dataclasses.dataclass(frozen=True, repr=False)
class Finding(Summary):
    """The result of one check.

    Attributes
    ----------
    name : str
        Name of the check.
    status : {'ok', 'warning', 'wrong', 'not applicable'}
        The outcome.
    text : str
        What the check observed, or why it does not apply.
    value : float or None
        The measured value, which is a relative error unless ``text`` says otherwise.
    limit : float or None
        The largest value that counts as ``'ok'``.
    remedy : str
        Advice on a warning or an error. The text is empty if the status is ``'ok'`` or ``'not applicable'``.
    """

    _num_text_columns = 4

    name: str
    status: str
    text: str = ""
    value: float | None = None
    limit: float | None = None
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status in (OK, NOT_APPLICABLE):
            object.__setattr__(self, "remedy", "")

    @property
    def observation(self) -> str:
        """The measured value, its limit and the text of the finding."""
        measured = ""
        if self.value is not None and self.status != NOT_APPLICABLE:
            measured = f"{self.value:.1e}" + ("" if self.limit is None else f" (at most {self.limit:.1e})")
        return "; ".join(part for part in (measured, self.text) if part)

    def __str__(self) -> str:
        remedy = f"; to do: {self.remedy}" if self.remedy else ""
        return f"{self.name}: {self.status}; {self.observation}{remedy}".removesuffix("; ")

    def _summary_text(self) -> tuple[str, str]:
        return "", ""

    def _summary_table(self) -> list[tuple[str, ...]]:
        return [_HEADINGS, self._cells]

    @property
    def _cells(self) -> tuple[str, str, str, str]:
        return _MARKS[self.status], self.name, self.observation, self.remedy


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CheckReport(Summary):
    """The findings of `curvop.check`.

    Print the report to see a table of the findings. For each problem, the table also gives advice. ``report[name]``
    returns the first finding with this name.

    Attributes
    ----------
    operator : str
        Class, shape and dtype of the operator.
    findings : tuple of Finding
        One or more findings for each check, in the order in which the checks ran.
    products : int
        Number of matrix-vector products.
    seconds : float
        Duration of the check.

    See Also
    --------
    curvop.check : Run the check.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import LinearOperator
    >>> from curvop import check
    >>> affine = LinearOperator((5, 5), matvec=lambda x: x + 1, dtype=float)
    >>> report = check(affine, rng=0)
    >>> report.ok
    False
    >>> report["linearity"].status
    'wrong'
    """

    _num_text_columns = 4

    operator: str
    findings: tuple[Finding, ...]
    products: int
    seconds: float

    @property
    def ok(self) -> bool:
        """True if no finding is ``'wrong'``. Some findings may be warnings."""
        return not self._with_status(WRONG)

    @property
    def verdict(self) -> str:
        """A one-line summary of the findings."""
        wrong, warned = self._with_status(WRONG), self._with_status(WARNING)
        warnings = f"{len(warned)} warning{'s' * (len(warned) != 1)}"
        if wrong:
            return f"not to be trusted: {_names(wrong)}" + (f"; also {warnings}" if warned else "")
        if warned:
            return f"nothing is wrong, with {warnings}: {_names(warned)}"
        return f"sound: {len(self._with_status(OK))} checks passed"

    def __getitem__(self, name: str) -> Finding:
        """Return the first finding named `name`."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        names = ", ".join(finding.name for finding in self.findings)
        raise KeyError(f"no finding is named {name!r}; there are {names}")

    def __str__(self) -> str:
        above, below = self._summary_text()
        width, lines = max((len(finding.name) for finding in self.findings), default=0), [above]
        for mark, name, observation, remedy in (finding._cells for finding in self.findings):
            start = f"  {mark:<7}  {name:<{width}}  "
            lines += _wrapped(start, observation)
            if remedy:
                lines += _wrapped(" " * len(start) + "to do: ", remedy)
        return "\n".join([*lines, below])

    def _summary_text(self) -> tuple[str, str]:
        return f"check of {self.operator}: {self.products} products, {self.seconds:.2f} s", self.verdict

    def _summary_table(self) -> list[tuple[str, ...]]:
        return [_HEADINGS, *(finding._cells for finding in self.findings)]

    def json(self) -> dict[str, Any]:
        """Return the report as a dictionary that ``json.dumps`` accepts.

        Returns
        -------
        dict
            A dictionary with the keys ``operator``, ``ok``, ``verdict``, ``findings``, ``products`` and ``seconds``.
            Each finding is a dictionary of its attributes. NaN and infinity are replaced by None.
        """

        def finite(value: float | None) -> float | None:
            return value if value is not None and math.isfinite(value) else None

        findings = [
            dataclasses.asdict(finding) | {"value": finite(finding.value), "limit": finite(finding.limit)}
            for finding in self.findings
        ]
        summary = {"operator": self.operator, "ok": self.ok, "verdict": self.verdict, "findings": findings}
        return summary | {"products": self.products, "seconds": self.seconds}

    def _with_status(self, status: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == status]


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=start, subsequent_indent=" " * len(start)) or [start.rstrip()]


def _names(findings: list[Finding]) -> str:
    return ", ".join(dict.fromkeys(finding.name for finding in findings))
