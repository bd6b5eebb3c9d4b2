"""The results as Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["cell", "document"]


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    if "failed" in result:
        return "failed"
    if "ms" not in result:
        return f"wrong ({result['error']:.0e})"
    device = f", {result['device_ms']:.3g} on the device" if "device_ms" in result else ""
    return f"{result['ms']:.3g} ms{device}" + (f" ({result['error']:.0e})" if "error" in result else "")


def times(rows: list[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(row["work"] for row in rows))
    pieces = []
    for kind in kinds:
        own = [row for row in rows if row["work"] == kind]
        names = list(dict.fromkeys(name for row in own for name in row.get("by", {})))
        lines = [[row["model"], *(cell(row.get("by", {}).get(name)) for name in names)] for row in own]
        pieces.append(f"### {kind}\n\n" + table(["model", *names], lines))
    return "\n".join(pieces)


def peaks(found: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in found for name in row["peak_mb"]))
    lines = []
    for row in found:
        values = [row["peak_mb"].get(name, "") for name in names]
        lines.append([row["model"], *(f"{v:.0f}" if isinstance(v, float) else "failed" if v else "" for v in values)])
    return table(["model", *names], lines)


def goals(found: list[dict[str, Any]]) -> str:
    lines = []
    for goal in found:
        if goal["reached"] is None and "compiled" in goal["ratio"] and not goal["models"]:
            continue  # no such engine yet
        mean, worst = (f"{v:.3g}" if v else "-" for v in (goal["geometric_mean"], goal["worst"]))
        target = f"{'at most' if goal['at_most'] else 'at least'} {goal['target']:g} ({goal['judged']})"
        verdict = {True: "yes", False: "no", None: "not measured"}[goal["reached"]]
        models = f"{len(goal['models'])}" + (f", without {', '.join(goal['missing'])}" if goal["missing"] else "")
        lines.append([goal["goal"], goal["ratio"], target, mean, worst, models, verdict])
    return table(["goal", "ratio of times", "target", "geometric mean", "worst", "models", "reached"], lines)


def failures(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    lines = [f"- {row['model']}, {row['work']}: {row['failed']}" for row in rows if "failed" in row]
    for row in rows:
        for name, result in row.get("by", {}).items():
            if "failed" in result:
                lines.append(f"- {row['model']}, {row['work']}, {name}: {result['failed']}")
    for row in found:
        for name, value in row["peak_mb"].items():
            if isinstance(value, dict):
                lines.append(f"- {row['model']}, peak memory, {name}: {value['failed']}")
    return "\n".join(lines) + "\n" if lines else "None.\n"


def earlier(rows: list[dict[str, Any]]) -> str:
    """Name the rows of earlier runs, if any."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        if "recorded" in row:
            runs.setdefault(row["recorded"], []).append(f"{row['work']} ({row['model']})")
    return "".join(f"\nOf an earlier run, {run}: {', '.join(which)}.\n" for run, which in runs.items())


def document(results: dict[str, Any]) -> str:
    about = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["peers"].items())
    return f"""# This package and its peers

Written by `{about["command"]}` on {about["date"]}, commit {about["commit"]}: \
{about["gpu"] + " beside " if "gpu" in about else ""}{about["processor"]}, \
{about["threads"]} threads, Python {about["python"]}, torch {about["torch"]}, SciPy {about["scipy"]}, {versions}; \
{results["seconds"] / 60:.0f} minutes.
{earlier(results["rows"])}
## Goals

Ratios of median times; what was wrong or failed has no time and is left out of the mean.

{goals(results["goals"])}
## Times

Median milliseconds, and in parentheses the error relative to double backward in float64 (Gauss-Newton and empirical \
Fisher: to forward and reverse mode). "wrong": above \
{results["wrong"]:g} and above twice the error of double backward by hand (eigenpairs, whose error is their residual: \
above {results["wrong_eigenpairs"]:g}), not timed. \
"gradient" and "whole" are yardsticks, not judged. "eigsh" takes the operator's construction in, but no compilation. \
Other times take in no linearization, no compilation and no recording of operations. \
Vectors are float32 from 10 million entries on, float64 below. SciPy's BLAS has one thread. \
Left out: {"; ".join(results["left_out"])}.

{times(results["rows"])}
## Peak memory

MB above what the process takes that has the problem but no operator yet; two products, compilation included.

{peaks(results["peaks"])}
## Failed

{failures(results["rows"], results["peaks"])}"""
