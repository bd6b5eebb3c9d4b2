"""What a check of an operator has found: for people, for programs."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

__all__ = ["NOT_APPLICABLE", "OK", "WARNING", "WRONG", "CheckReport", "Finding"]

OK, WARNING, WRONG, NOT_APPLICABLE = "ok", "warning", "wrong", "not applicable"

_MARKS = {OK: "ok", WARNING: "warning", WRONG: "WRONG", NOT_APPLICABLE: "-"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
    status : {'ok', 'warning', 'wrong', 'not applicable'}
    text : str
        What was found, or why it does not apply.
    value, limit : float or None
        What was measured, relative unless the text says otherwise, and up to where it is 'ok'.
    remedy : str
        What to do where it is a warning, or wrong.
    """

    name: str
    status: str
    text: str = ""
    value: float | None = None
    limit: float | None = None
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status in (OK, NOT_APPLICABLE):
            object.__setattr__(self, "remedy", "")

    def __str__(self) -> str:
        measured = ""
        if self.value is not None and self.status != NOT_APPLICABLE:
            measured = f"{self.value:.1e}" + ("" if self.limit is None else f" (at most {self.limit:.1e})")
        return "; ".join(part for part in (measured, self.text) if part)


@dataclasses.dataclass(frozen=True, eq=False)
class CheckReport:
    """What `curvop.check` has found; it prints as a table.

    Attributes
    ----------
    operator : str
        Which one was checked.
    findings : tuple of Finding
    products : int
        Columns that were multiplied.
    seconds : float
    """

    operator: str
    findings: tuple[Finding, ...]
    products: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; there may be warnings."""
        return not self._of(WRONG)

    @property
    def verdict(self) -> str:
        """One sentence on all of it."""
        wrong, warned = self._of(WRONG), self._of(WARNING)
        warnings = f"{len(warned)} warning{'s' * (len(warned) != 1)}"
        if wrong:
            return f"not to be trusted: {_names(wrong)}" + (f"; {warnings} besides" if warned else "")
        if warned:
            return f"nothing is wrong, with {warnings}: {_names(warned)}"
        return f"sound: {len(self._of(OK))} checks passed"

    def __getitem__(self, name: str) -> Finding:
        """Return the first finding of this name."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"no finding is named {name!r}; there are {', '.join(one.name for one in self.findings)}")

    def __str__(self) -> str:
        width = max((len(finding.name) for finding in self.findings), default=0)
        lines = [f"check of {self.operator}: {self.products} products, {self.seconds:.2f} s"]
        for finding in self.findings:
            start = f"  {_MARKS[finding.status]:<7}  {finding.name:<{width}}  "
            lines += _wrapped(start, str(finding))
            if finding.remedy:
                lines += _wrapped(" " * len(start) + "to do: ", finding.remedy)
        return "\n".join([*lines, self.verdict])

    def json(self) -> dict[str, Any]:
        """Return what JSON takes."""

        def number(value: float | None) -> float | None:
            return value if value is not None and math.isfinite(value) else None

        findings = [
            dataclasses.asdict(finding) | {"value": number(finding.value), "limit": number(finding.limit)}
            for finding in self.findings
        ]
        own = {"operator": self.operator, "ok": self.ok, "verdict": self.verdict, "findings": findings}
        return own | {"products": self.products, "seconds": self.seconds}

    def _of(self, status: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == status]


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=start, subsequent_indent=" " * len(start)) or [start.rstrip()]


def _names(findings: list[Finding]) -> str:
    return ", ".join(dict.fromkeys(finding.name for finding in findings))
