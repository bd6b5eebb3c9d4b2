"""What a study of a spectrum has found: for people, for programs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from curvop.spectrum.blocks import BlockStudy
from curvop.spectrum.bounded import BoundedEstimate
from curvop.spectrum.density import SpectralDensity
from curvop.spectrum.eigen import EigenResult
from curvop.spectrum.estimators import Estimate

__all__ = ["Findings"]

_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of a density's eigenvalues, for which its quantiles are told


@dataclasses.dataclass(eq=False)
class Findings:
    """All that ``curvop spectrum`` reports; what is None was not asked for, or is among what is `undone`."""

    problem: str
    title: str
    rows: int
    parameters: int
    names: list[str]
    loss: float
    gradient_norm: float
    ends: list[EigenResult] = dataclasses.field(default_factory=list)
    trace: Estimate | None = None
    norm: Estimate | None = None
    density: SpectralDensity | None = None
    blocks: BlockStudy | None = None
    undone: list[str] = dataclasses.field(default_factory=list)
    products: int = 0
    seconds: float = 0.0
    journal_bytes: int | None = None

    @property
    def ok(self) -> bool:
        """Whether everything is done, and all eigenvalues are certified."""
        return not self.undone and all(end.ok for end in self.ends)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The single figures, by name."""
        found = [
            ("parameters", f"{self.parameters:,}"),
            ("rows", f"{self.rows:,}" + ("" if self.rows == self.parameters else f" ({', '.join(self.names)})")),
            ("loss", f"{self.loss:.6g}"),
            ("gradient norm", f"{self.gradient_norm:.3g}"),
        ]
        for name, estimate in (("trace", self.trace), ("Frobenius norm", self.norm)):
            if estimate is not None:
                found.append((name, str(estimate)))
        if self.density is not None:
            low, high = self.density.range
            found.append(("range seen by the density", f"{low:.6g} to {high:.6g}"))
        cost = f"{self.products:,} in {self.seconds:.1f} s"
        found.append(("products, those answered from disk left out", cost))
        if self.journal_bytes is not None:
            found.append(("journal of the products, on disk", f"{self.journal_bytes / 1e6:.3g} MB"))
        return found

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{self.title} of {self.problem}", *(f"  {name:<{width}}  {value}" for name, value in self.facts)]
        for end in self.ends:
            lines += ["", str(end)]
        if self.blocks is not None:
            lines += ["", str(self.blocks)]
        return "\n".join([*lines, "", *(self.undone or ["everything that was asked for is done"])])

    def json(self) -> dict[str, Any]:
        """Return what JSON takes; the arrays are in the ``.npz`` files."""

        def number(value: Any) -> float | None:
            return float(value) if value is not None and math.isfinite(value) else None

        def estimate(found: Estimate | None) -> dict[str, Any] | None:
            return None if found is None else {"value": number(found.value), "error": number(found.error)}

        def quantile(found: BoundedEstimate) -> dict[str, Any]:
            return {name: number(getattr(found, name)) for name in ("value", "error", "low", "high")}

        def density(found: SpectralDensity) -> dict[str, Any]:
            return {
                "probes": len(found.nodes),
                "steps": found.num_steps,
                "exact": found.exact,
                "range": list(found.range),
                "range_errors": [number(error) for error in found.range_errors],
                "trace": estimate(found.trace()),
                "quantiles": {str(share): quantile(found.quantile(share)) for share in _SHARES},
            }

        names = ("problem", "title", "rows", "parameters", "names", "undone", "products", "seconds", "journal_bytes")
        own = {name: getattr(self, name) for name in names}
        return own | {
            "loss": number(self.loss),
            "gradient_norm": number(self.gradient_norm),
            "ok": self.ok,
            "trace": estimate(self.trace),
            "frobenius_norm": estimate(self.norm),
            "density": None if self.density is None else density(self.density),
            "ends": [
                {
                    "which": end.which,
                    "values": [float(value) for value in end.values],
                    "bounds": [] if end.certificate is None else [number(bound) for bound in end.certificate.bounds],
                    "converged": end.num_converged,
                    "ok": end.ok,
                    "verdict": end.verdict,
                }
                for end in self.ends
            ],
            "blocks": None
            if self.blocks is None
            else {
                name: {
                    "rows": found.size,
                    "smallest": found.range[0],
                    "largest": found.range[1],
                    "smallest_error": number(found.range_errors[0]),
                    "largest_error": number(found.range_errors[1]),
                    "trace": float(found.trace().value),
                    "norm": norm,
                    "density": density(found),
                }
                for name, found, norm in zip(
                    self.blocks.names,
                    self.blocks.densities,
                    self.blocks.norms.diagonal().tolist(),
                    strict=True,
                )
            },
        }
