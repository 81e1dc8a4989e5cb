"""Single operations in each of their forms: time, rate, memory, and the check that they agree.

    python tools/benchmark_ops.py --json OUT.json [--device cuda|cpu] [--operations rms_norm,lact]
        [--shapes deltanet-1.3b,lact-760m] [--tokens 4096,16384] [--forms torch,triton]
        [--dtype bfloat16|float32] [--rounds 5]

Sizes are those of a layer of the presets in --shapes; of eight branches of a text decode is a
token, score and lact_read five, and read their states after 64 more; branch_decode and branches are
attention of one token and of five. Forms are `torch`, `compile` (torch.compile of it), `triton`
(the project's kernels), `flash` (attention by FlashAttention), `fla` (flash-linear-attention, the
delta rules) and `liger` (Liger's fused linear cross-entropy, vocabulary, whose forward makes the
gradients too), of which those run that are installed; on a CPU only torch's. A form is timed once
it agrees with torch's in float32, gradients included. Prints a Markdown table:
milliseconds of the forward and of forward and backward with the ratio to torch's in the same round,
the forward's rate as a share of this machine's own (of a plain copy, or of a plain product where
the operation has products), and on a GPU the peak memory above the inputs. JSON has seconds, the
rates and what they were measured on.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refine_mcore.errors import UserError, cli

SHAPES = "lact-760m,deltanet-1.3b,qwen3.5-2b,deltanet-7b"


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    import torch

    from refine_mcore import platform
    from refine_mcore.benchmark import ops
    from refine_mcore.models.presets import preset
    from refine_mcore.report import write_json

    output = Path(arguments.json)
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no directory to write {output.name} to")
    device = torch.device(arguments.device or platform.device().type)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here")
    forms = _chosen("--forms", arguments.forms, ops.FORMS)
    forms = ["torch"] if device.type == "cpu" else ops.available(forms)
    operations = _chosen("--operations", arguments.operations, ops.OPERATIONS)
    shapes = {name: preset(name) for name in arguments.shapes.split(",")}
    lengths = _lengths(arguments.tokens)
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {arguments.rounds}")
    dtype = getattr(torch, arguments.dtype)
    copied, multiplied = ops.ceilings(dtype, device)
    report: dict[str, Any] = {
        "dtype": arguments.dtype,
        "copy_bytes_per_second": copied,
        "product_operations_per_second": multiplied,
        "rows": [],
    }
    print(f"copy {copied / 1e9:.0f} GB/s, product {multiplied / 1e12:.2f} TFLOP/s\n")
    print(
        "| operation | sizes | tokens | form | error | forward, ms | with backward, ms | rate "
        "| memory, MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in operations:
        for label, architecture in shapes.items():
            for tokens in [ops.BRANCHES[name][1]] if name in ops.BRANCHES else lengths:
                case = ops.case_of(name, architecture, tokens)
                if case is None:
                    continue
                rows = ops.measure(case, tokens, dtype, device, forms, arguments.rounds)
                for row in rows:
                    cells = _cells(row, rows[0], copied, multiplied)
                    print(f"| {name} | {label} | {tokens} | {' | '.join(cells)} |", flush=True)
                where = {"operation": name, "sizes": label, "tokens": tokens}
                report["rows"] += [where | asdict(row) for row in rows]
                write_json(output, report)


def _cells(row: Any, first: Any, copied: float, multiplied: float) -> list[str]:
    """The row's columns from its form on; ratios are to `first`."""
    error = "" if row.error is None else f"{row.error:.0e}"
    if row.why is not None:
        return [row.form, error, row.why, "", "", ""]
    times = [
        "" if mine is None else f"{mine * 1e3:.2f}" + (f" ({mine / base:.2f})" if base else "")
        for mine, base in ((row.forward, first.forward), (row.both, first.both))
    ]
    rate = (
        f"{row.products / 1e12:.2f} TFLOP/s, {row.products / multiplied:.0%}"
        if row.products
        else f"{row.moved / 1e9:.0f} GB/s, {row.moved / copied:.0%}"
    )
    peak = "" if row.peak is None else f"{row.peak / 2**20:.0f}"
    return [row.form, error, *times, rate, peak]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is")
    parser.add_argument("--operations", help="with commas; default: all")
    parser.add_argument("--shapes", default=SHAPES, help="presets, with commas")
    parser.add_argument("--tokens", default="4096,16384", help="with commas")
    parser.add_argument("--forms", help="with commas; default: all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


def _chosen(option: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    chosen = list(known) if text is None else text.split(",")
    for name in chosen:
        if name not in known:
            raise UserError(f"{option} knows {', '.join(known)}, not {name!r}")
    return chosen


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--tokens takes whole numbers with commas, not {text!r}") from None
    if min(lengths) < 1:
        raise UserError(f"--tokens must be at least 1, not {min(lengths)}")
    return lengths


if __name__ == "__main__":
    cli(main)
