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
# Of next tokens by position: the means, and the sums that each is made of.
_FIGURES = {
    "loss": "loss",
    "accuracy_argmax": "argmax_hits",
    "accuracy_sampled": "sampled_hits",
}
_SUMS = ("tokens", *_FIGURES.values())


@dataclass(frozen=True)
class Mean:
    """Mean of `count` values, and its standard error (None for one value). The values are of rows
    or texts, the mean may weigh them."""

    mean: float
    standard_error: float | None
    count: int

    @classmethod
    def of(cls, totals: Sequence[float], sizes: Sequence[float] | None = None) -> Mean:
        """Of totals over so much each (1 if None): their sum over that of the sizes, with the
        standard error of such a ratio, linearised."""
        n = len(totals)
        sizes = [1.0] * n if sizes is None else sizes
        whole = math.fsum(sizes)
        mean = math.fsum(totals) / whole
        if n < 2:
            return cls(mean, None, n)
        squares = math.fsum((x - mean * size) ** 2 for x, size in zip(totals, sizes, strict=True))
        return cls(mean, math.sqrt(squares * n / (n - 1)) / whole, n)

    def percent(self) -> str:
        """As the tables show it."""
        error = "" if self.standard_error is None else f" ± {100 * self.standard_error:.1f}"
        return f"{100 * self.mean:.1f}{error}"


def scores(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Mean]]:
    """Per task the mean score of every length, the shortest first, and of "all" rows together.

    Of a row with several seeds the mean counts once, so that the standard error is one over rows.
    """
    rows: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    for line in lines:
        length = line["group"].get("length", math.inf)
        rows[line["task"], length, line["key"]].append(line["score"])
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (task, length, _), values in rows.items():
        for column in {length, math.inf}:
            found[task][column].append(math.fsum(values) / len(values))
    return {
        task: {"all" if x == math.inf else str(x): Mean.of(columns[x]) for x in sorted(columns)}
        for task, columns in found.items()
    }


def next_token_means(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per bucket of positions, and of "all" together, the mean loss and accuracies of its tokens,
    with the standard error over texts."""
    buckets: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    whole: list[dict[str, Any]] = []
    for line in lines:
        found = [bucket for bucket in line["buckets"] if bucket["tokens"]]
        for bucket in found:
            buckets[bucket["start"], bucket["stop"]].append(bucket)
        whole.append({name: sum(bucket[name] for bucket in found) for name in _SUMS})
    named = {f"{start} to {stop}": buckets[start, stop] for start, stop in sorted(buckets)}
    if whole:
        named["all"] = whole
    return [
        {"positions": name, "tokens": sum(x["tokens"] for x in of_texts)}
        | {
            figure: asdict(Mean.of(*([x[y] for x in of_texts] for y in (column, "tokens"))))
            for figure, column in _FIGURES.items()
        }
        for name, of_texts in named.items()
    ]


def markdown(
    table: dict[str, dict[str, Mean]],
    positions: list[dict[str, Any]],
    checkpoint: Path,
    arithmetic: dict[str, str],
) -> str:
    """Tables like the paper's: a row per task, a column per length, in percent; then next tokens by
    position; and of which checkpoint, computed in what."""
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
                f"| {x['positions']} | {loss.mean:.3f}{error} | {argmax.percent()} | "
                f"{sampled.percent()} | {x['tokens']:,} |"
            )
        parts.append("\n".join(lines))
    settings = ", ".join(f"{x} {y}" for x, y in arithmetic.items())
    parts.append(f"Checkpoint {checkpoint}, computed with {settings}.")
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
