"""Compiles the Triton kernels for GPUs that need not be there: what the compiler makes of them.

    python tools/compile_kernels.py [--arch sm_80,sm_90] [--kernels delta_rule,rms_norm]
        [--heads 128x128,256x512] [--gates both|yes|no]

Prints a Markdown table: registers a thread, spilled bytes a thread, shared memory in KB. Exit code
1 if a kernel spills more than the budget, needs more shared memory than the chip has, or multiplies
matrices without tensor cores. Needs triton, whose wheel brings the assembler; no GPU, no driver.
About a second a kernel, some minutes an architecture.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from refine_mcore.errors import UserError, cli

# Where each operation's variants are listed.
LISTS = {
    "delta_rule": "delta_rule.triton_variants",
    "decode": "delta_rule.triton_recurrent",
    "few": "delta_rule.triton_few",
    "read": "delta_rule.triton_read",
    "gates": "delta_gates.triton_gates",
    "lact": "lact.triton_forms",
    "branches": "attention.triton_branches",
    "branches_decode": "attention.triton_decode",
    "features": "lact.triton_features",
    "rms_norm": "rms_norm.triton_rms_norm",
    "rotary": "rotary.triton_rotary",
    "short_conv": "short_conv.triton_conv",
    "swiglu": "swiglu.triton_swiglu",
    "vocabulary": "vocab.triton_rows",
    "sampling": "vocab.triton_sampling",
}
# Shared memory of a block, in bytes, and the instructions of tensor cores.
CHIPS = {
    "sm_80": (163 * 1024, "mma.sync"),
    "sm_89": (99 * 1024, "mma.sync"),
    "sm_90": (227 * 1024, "wgmma"),
    "sm_100": (227 * 1024, "tcgen05.mma"),
    "sm_120": (99 * 1024, "mma.sync"),
}
# Bytes a thread may spill: no more than four registers where the published models run, on chips of
# data centres; the rest may spill some. (Of 8 bytes that it takes at times registers were left.)
FEW_SPILLED, MOST_SPILLED = 16, 384
_MAY_SPILL = ("sm_80", "sm_89", "sm_120")


class Compiled(NamedTuple):
    """What the compiler says of a kernel; `tensor_cores` if its products run on them."""

    registers: int
    spilled: int
    shared: int
    tensor_cores: bool


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default=",".join(CHIPS), help="architectures, with commas")
    parser.add_argument("--kernels", default=",".join(LISTS), help="operations, with commas")
    parser.add_argument("--heads", help="delta_rule's KEYSxVALUES, with commas; default: all")
    parser.add_argument(
        "--gates", choices=["both", "yes", "no"], default="both", help="delta_rule's"
    )
    arguments = parser.parse_args(argv)
    chips = arguments.arch.split(",")
    for chip in chips:
        if chip not in CHIPS:
            raise UserError(f"--arch knows {', '.join(CHIPS)}, not {chip!r}")
    for name in arguments.kernels.split(","):
        if name not in LISTS:
            raise UserError(f"--kernels knows {', '.join(LISTS)}, not {name!r}")
    gated = {"both": (False, True), "yes": (True,), "no": (False,)}[arguments.gates]
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
    options: dict[str, Any] = {"gated": gated}
    if arguments.heads is not None:
        options["heads"] = _heads(arguments.heads)
    try:
        lists = {
            name: importlib.import_module(f"refine_kernels.{LISTS[name]}")
            for name in arguments.kernels.split(",")
        }
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: compiling takes the extra `dev`") from None
    kernels = [
        variant
        for name, module in lists.items()
        for variant in module.variants(**(options if name == "delta_rule" else {}))
    ]
    problems = []
    print(f"| kernel | {' | '.join(chips)} |\n|---{'|---' * len(chips)}|")
    for variant in kernels:
        cells = []
        for chip in chips:
            found = compiled(variant, chip)
            problems += [
                f"{variant.name} for {chip}: {why}" for why in _faults(variant, chip, found)
            ]
            cells.append(f"{found.registers}, {found.spilled}, {found.shared // 1024}")
        print(f"| {variant.name} | {' | '.join(cells)} |", flush=True)
    for problem in problems:
        print(f"over budget: {problem}")
    if problems:
        raise SystemExit(1)


def compiled(variant: Any, chip: str) -> Compiled:
    """A kernel as `chip` would run it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, variant.attributes)
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    kernel = triton.compile(source, target=target, options=variant.options)
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [dump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, spilled = (
        int(number) for name in ("REG", "STACK") for number in re.findall(rf"{name}:(\d+)", usage)
    )
    instructions = [CHIPS[chip][1], *([CHIPS["sm_80"][1]] if variant.few_rows else [])]
    on_tensor_cores = any(x in kernel.asm["ptx"] for x in instructions)
    return Compiled(registers, spilled, kernel.metadata.shared, on_tensor_cores)


def _faults(variant: Any, chip: str, found: Compiled) -> list[str]:
    shared, instruction = CHIPS[chip]
    may_spill = variant.may_spill or chip in _MAY_SPILL
    budget = MOST_SPILLED if may_spill else FEW_SPILLED
    faults = []
    if found.spilled > budget:
        faults.append(f"{found.spilled} bytes a thread are spilled, more than {budget}")
    if found.shared > shared:
        faults.append(f"{found.shared} bytes of shared memory, the chip has {shared}")
    if variant.products and not found.tensor_cores:
        faults.append(f"no {instruction}")
    return faults


def _heads(text: str) -> list[tuple[int, int]]:
    widths = []
    for pair in text.split(","):
        if re.fullmatch(r"\d+x\d+", pair) is None:
            raise UserError(f"--heads is KEYSxVALUES, such as 128x128, not {pair!r}")
        keys, values = pair.split("x")
        widths.append((int(keys), int(values)))
    return widths


if __name__ == "__main__":
    cli(main)
