"""What a check found, as a line while the checks run and as a row of the table at their end."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from refine_mcore.evaluation.differences import Difference, broken

PASS, FAIL, ABSENT = "pass", "fail", "not on this machine"
_SHOWN = 3  # broken comparisons that a row names; the JSON holds all of them


@dataclass(frozen=True)
class Result:
    """One row: the check, PASS, FAIL or ABSENT, a sentence, and figures for the JSON."""

    check: str
    status: str
    found: str
    figures: dict[str, Any] = field(default_factory=dict)


def compared(check: str, differences: Sequence[Difference]) -> Result:
    """PASS if there are comparisons and all of them hold."""
    if not differences:
        return Result(check, FAIL, "nothing was compared")
    wrong = broken(differences)
    worst = max(differences, key=lambda d: d.used)
    figures: dict[str, Any] = {"comparisons": len(differences), "worst": asdict(worst)}
    if not wrong:
        nearest = f"nearest to its limit: {worst}" if worst.error else "all equal"
        return Result(check, PASS, f"{len(differences)} comparisons, {nearest}", figures)
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    found = "off: " + "; ".join(map(str, wrong[:_SHOWN])) + more
    return Result(check, FAIL, found, figures | {"broken": [asdict(d) for d in wrong]})


def raised(check: str, error: Exception) -> Result:
    """FAIL with the first line of what was raised; all of it goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    first_line = (str(error).strip().splitlines() or [""])[0]
    return Result(check, FAIL, f"{type(error).__name__}: {first_line}")


def markdown_table(results: Iterable[tuple[str, Result]]) -> str:
    """One row per (section, result)."""
    rows = ["| section | check | result | found |", "|---|---|---|---|"]
    for section, result in results:
        found = result.found.replace("|", "\\|").replace("\n", " ")
        rows.append(f"| {section} | {result.check} | {result.status} | {found} |")
    return "\n".join(rows)
