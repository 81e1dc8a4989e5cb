"""Tables and plot of results.jsonl: each arm against the next-token arm of the same seed, at equal
steps and at equal FLOPs, with 95 % intervals of the mean paired difference (Student's t).

    python examples/studies/refine_vs_ntp/report.py > tables.md
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LENGTHS = (256, 512, 1024, 2048)
# 97.5 % points of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Lines = dict[str, dict[int, dict[str, Any]]]  # by model and seed


def main() -> None:
    families: dict[str, Lines] = defaultdict(lambda: defaultdict(dict))
    for text in (HERE / "results.jsonl").read_text().splitlines():
        line = json.loads(text)
        families[line["family"]][line["model"]][line["seed"]] = line
    for family, models in families.items():
        print(f"### {family}, {len(models['ntp'])} seeds\n")
        _levels(models)
        _differences(models)
    _plot(families)


def _levels(models: Lines) -> None:
    columns = [f"recall {n}" for n in LENGTHS]
    print("| model | steps | FLOPs | s a step | " + " | ".join(columns) + " | loss 512 | reward |")
    print("|---" * (len(columns) + 6) + "|")
    for name, by_seed in models.items():
        first, lines = next(iter(by_seed.values())), list(by_seed.values())
        step = sorted(line["seconds_per_step"] for line in lines)[len(lines) // 2]
        cells = [f"{100 * _mean([x[c] for x in lines]):.1f} %" for c in columns]
        cells += [f"{_mean([x['loss 512'] for x in lines]):.3f}"]
        cells += [f"{_mean([x['reward'] for x in lines]):.3f}"]
        print(
            f"| {name} | {first['steps']} | {first['flops']:.2e} | {step:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    print()


def _differences(models: Lines) -> None:
    """Arm less next-token arm, by seed."""
    wanted = [*(f"recall {n}" for n in LENGTHS), "loss 512", "loss 2048", "reward"]
    print("| arm | against ntp at | " + " | ".join(wanted) + " |")
    print("|---" * (len(wanted) + 2) + "|")
    for arm in models:
        if arm in ("pretrained", "ntp") or arm.startswith("ntp,"):
            continue
        for equal, base in (("equal steps", "ntp"), ("equal FLOPs", f"ntp, FLOPs of {arm}")):
            cells = []
            for name in wanted:
                pairs = [models[arm][s][name] - models[base][s][name] for s in models[arm]]
                scale, unit = (100, " pt") if "recall" in name else (1, "")
                mean, half = _mean(pairs), _half_width(pairs)
                digits = 1 if scale == 100 else 4
                cells.append(f"{scale * mean:+.{digits}f} ± {scale * half:.{digits}f}{unit}")
            print(f"| {arm} | {equal} | " + " | ".join(cells) + " |")
    print()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _half_width(values: list[float]) -> float:
    """Of the 95 % interval of the mean."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return _T[len(values) - 1] * math.sqrt(variance / len(values))


def _plot(families: dict[str, Lines]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(families), figsize=(5 * len(families), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (family, models) in zip(axes[0], families.items(), strict=True):
        for name, by_seed in models.items():
            lines = list(by_seed.values())
            means = [_mean([x[f"recall {n}"] for x in lines]) for n in LENGTHS]
            style = ":" if name == "pretrained" else "--" if name.startswith("ntp,") else "-"
            axis.plot(LENGTHS, means, style, marker=".", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.set_xlabel("tokens (facts told: length / 32)")
        axis.set_title(family)
    axes[0][0].set_ylabel("recall")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(HERE / "recall.png", dpi=110)


if __name__ == "__main__":
    main()
