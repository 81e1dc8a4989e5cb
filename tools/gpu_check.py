"""Does this machine compute what it should, and how fast: one command for a machine with GPUs.

    python tools/gpu_check.py [--device cuda|cpu] [--only SECTION,...] [--json OUT.json]

Sections: machine (devices, libraries), operations (each of refine_kernels against its definition on
the CPU, with gradients), models (the reference models of tests/golden), steps (the ReFINE step of
every family against the same on the CPU), branching (rollouts in place against copied prefixes),
waits (where the host waits for the device), layouts (two ranks against one), cost (seconds and
memory of the step). Each check passes, fails or is "not on this machine"; all are in the Markdown
table at the end and in the JSON. The exit code is 1 if one failed.

It takes some minutes. `--device cpu` runs everything in tiny on the CPU, also where there are GPUs.
It runs from a checkout: the reference models and texts are not part of the package.
"""

import argparse
import os
import sys
from datetime import date
from pathlib import Path

from refine_mcore.errors import UserError, cli

ROOT = Path(__file__).parents[1]
SECTIONS = ("machine", "operations", "models", "steps", "branching", "waits", "layouts", "cost")
FAILED_EXIT_CODE = 1


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    chosen = _sections(arguments.only)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("gpu_check.py starts the ranks it needs itself: run it without torchrun")
    output = Path(arguments.json or _default_output(arguments.device))
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise UserError(f"{output.parent} is no directory to write {output.name} to")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is asked for devices

    from refine_mcore import platform

    if platform.device().type != arguments.device:
        raise UserError(
            "torch finds no CUDA device here: with --device cpu the checks run in tiny on the CPU"
            if arguments.device == "cuda"
            else "--device cpu was asked for after CUDA had started"
        )
    from refine_mcore.benchmark.gpu_check.run import run_checks

    if not run_checks(ROOT, chosen, output):
        sys.exit(FAILED_EXIT_CODE)


def _sections(only: str | None) -> list[str]:
    if only is None:
        return list(SECTIONS)
    chosen = only.split(",")
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        raise UserError(f"--only: unknown section {unknown[0]!r}, known: {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in chosen]


def _default_output(device: str) -> Path:
    name = "gpu" if device == "cuda" else "cpu"
    return ROOT / "docs" / "benchmarks" / f"{date.today()}-{name}-check.json"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", metavar="SECTION,...", help="default: all sections")
    parser.add_argument("--json", help="default: docs/benchmarks/DATE-gpu-check.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli(main)
