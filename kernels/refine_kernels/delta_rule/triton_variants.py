"""The delta rule's kernels as they are compiled ahead of time, for machines without a GPU.

Each entry has what triton.compiler.ASTSource and triton.compile take.  Nothing at run time reads
this list: there, Triton compiles what a call needs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from refine_kernels.delta_rule import triton_kernels as kernels
from refine_kernels.delta_rule.triton_chunk import Call

NAMES = (
    "gram",
    "invert",
    "apply",
    "scan",
    "output",
    "local",
    "reverse",
    "queries",
    "inputs",
)
# Key and value widths of the published models from 0.4B to 7B, and the edges of what is taken.
HEADS = ((64, 64), (96, 192), (128, 128), (192, 192), (256, 256), (256, 512))

_SCRATCH = ("w", "errors", "grad_writes", "grad_states", "grad_scores")
_AS_INPUTS = ("q", "k", "v", "o", "grad_o", "grad_q", "grad_k", "grad_v")
_OF_GATES = ("g", "grad_g", "log_decays", "grad_log_decays")


class Variant(NamedTuple):
    """A kernel and what it is compiled for."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]  # addresses and strides divide by 16
    options: dict[str, int]  # warps and pipeline stages


def variants(
    heads: Sequence[tuple[int, int]] = HEADS, gated: Sequence[bool] = (False, True)
) -> Iterator[Variant]:
    """All kernels for bfloat16 inputs with norms, gates in float32, chunks of 64."""
    for k_dim, v_dim in heads:
        for with_gates in gated:
            call = Call(k_dim, v_dim, 1, 64, with_gates, norm=True, output=True, products="bf16")
            for name in NAMES:
                yield _variant(name, call)


def _variant(name: str, call: Call) -> Variant:
    kernel = getattr(kernels, name)
    constexprs = call.constants(name)
    if not call.gated:
        constexprs |= {x: None for x in _OF_GATES if x in kernel.arg_names}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constexprs:
            signature[argument] = "constexpr"
            continue
        signature[argument] = _type(argument)
        if signature[argument].startswith("*") or argument.startswith("stride"):
            attributes[i,] = [["tt.divisibility", 16]]
    title = f"{'gated_' * call.gated}delta_rule_{name}_k{call.k_dim}_v{call.v_dim}"
    return Variant(title, kernel, signature, constexprs, attributes, call.launch(name))


def _type(argument: str) -> str:
    if argument in ("n", "H") or argument.startswith("stride"):
        return "i32"
    if argument in ("scale", "eps"):
        return "fp32"
    if argument == "slots":
        return "*i32"
    return "*bf16" if argument in (*_SCRATCH, *_AS_INPUTS) else "*fp32"
