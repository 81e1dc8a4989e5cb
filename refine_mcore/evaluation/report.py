"""What results come to: means with standard errors and counts, as JSON, a Markdown table and a
heat map of needles by length and depth."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refine_mcore.errors import UserError
from refine_mcore.files import written_whole

_DEPTH_BINS = 10  # of the heat map


@dataclass(frozen=True)
class Mean:
    """Mean of `count` values, and its standard error (None for one value)."""

    mean: float
    standard_error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return cls(mean, None, n)
        variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1)
        return cls(mean, math.sqrt(variance / n), n)

    def percent(self) -> str:
        """As the tables show it."""
        error = "" if self.standard_error is None else f" ± {100 * self.standard_error:.1f}"
        return f"{100 * self.mean:.1f}{error}"


def scores(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Mean]]:
    """Per task the mean score of every length ("all" where rows have none), and of all together.

    Of a row with several seeds the mean counts once, so that the standard error is one over rows.
    """
    rows: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for line in lines:
        column = str(line["group"].get("length", "all"))
        rows[line["task"], column, line["key"]].append(line["score"])
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (task, column, _), values in rows.items():
        mean = math.fsum(values) / len(values)
        found[task][column].append(mean)
        if column != "all":
            found[task]["all"].append(mean)
    return {
        task: {column: Mean.of(values) for column, values in columns.items()}
        for task, columns in found.items()
    }


def next_token_means(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per bucket of positions the mean over texts of loss and accuracies, weighted alike."""
    buckets: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        for bucket in line["buckets"]:
            if bucket["tokens"]:
                buckets[bucket["start"], bucket["stop"]].append(bucket)
    return [
        {"start": start, "stop": stop, "tokens": sum(x["tokens"] for x in found)}
        | {
            name: asdict(Mean.of([x[column] / x["tokens"] for x in found]))
            for name, column in (
                ("loss", "loss"),
                ("accuracy_argmax", "argmax_hits"),
                ("accuracy_sampled", "sampled_hits"),
            )
        }
        for (start, stop), found in sorted(buckets.items())
    ]


def markdown(table: dict[str, dict[str, Mean]], positions: list[dict[str, Any]]) -> str:
    """Tables like the paper's: a row per task, a column per length, in percent; then next tokens by
    position."""
    parts = []
    if table:
        lengths = sorted({x for row in table.values() for x in row if x != "all"}, key=int)
        columns = [*lengths, "all"]
        lines = ["| task | " + " | ".join(columns) + " | rows |", "|---" * (len(columns) + 2) + "|"]
        for task, row in table.items():
            cells = [row[x].percent() if x in row else "" for x in columns]
            lines.append(f"| {task} | " + " | ".join(cells) + f" | {row['all'].count} |")
        parts.append("\n".join(lines))
    if positions:
        lines = [
            "| positions | loss, nats | accuracy, likeliest | accuracy, sampled | tokens |",
            "|---|---|---|---|---|",
        ]
        for x in positions:
            loss, argmax, sampled = (
                Mean(**x[name]) for name in ("loss", "accuracy_argmax", "accuracy_sampled")
            )
            error = "" if loss.standard_error is None else f" ± {loss.standard_error:.3f}"
            lines.append(
                f"| {x['start']} to {x['stop']} | {loss.mean:.3f}{error} | {argmax.percent()} | "
                f"{sampled.percent()} | {x['tokens']:,} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot_needles(lines: Iterable[dict[str, Any]], path: Path) -> bool:
    """A heat map of the scores by length and depth, one for each variant; False without needles."""
    cells: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        group = line["group"]
        if "depth" in group:
            depth = min(group["depth"] * _DEPTH_BINS // 100, _DEPTH_BINS - 1)
            cells[line["task"]][depth, group["length"]].append(line["score"])
    if not cells:
        return False
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("plots take matplotlib, of the extra `eval`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(cells), figsize=(3.2 * len(cells), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (task, found) in zip(axes[0], cells.items(), strict=True):
        lengths = sorted({length for _, length in found})
        grid = [
            [
                sum(values) / len(values) if (values := found.get((depth, length))) else math.nan
                for length in lengths
            ]
            for depth in range(_DEPTH_BINS)
        ]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(task, fontsize=9)
        axis.set_xticks(range(len(lengths)), [str(x) for x in lengths])
        depths = [f"{100 * i // _DEPTH_BINS} %" for i in range(_DEPTH_BINS)]
        axis.set_yticks(range(_DEPTH_BINS), depths)
        axis.set_xlabel("length, tokens")
    axes[0][0].set_ylabel("depth")
    figure.colorbar(image, ax=axes[0], label="score")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    return True
