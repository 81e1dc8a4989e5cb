"""The chunkwise delta rules' kernels as they are compiled ahead of time."""

from collections.abc import Iterator, Sequence

from refine_kernels.delta_rule import triton_kernels as kernels
from refine_kernels.delta_rule.triton_chunk import Call
from refine_kernels.triton_variant import Variant, variant

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

_SCRATCH = ("w", "errors", "writes", "grad_writes", "grad_states", "grad_scores")
_AS_INPUTS = ("q", "k", "v", "o", "grad_o", "grad_q", "grad_k", "grad_v")
_OF_GATES = ("g", "grad_g", "log_decays", "grad_log_decays")


def variants(
    heads: Sequence[tuple[int, int]] = HEADS, gated: Sequence[bool] = (False, True)
) -> Iterator[Variant]:
    """All kernels for bfloat16 inputs with norms, gates in float32, chunks of 64."""
    for k_dim, v_dim in heads:
        for with_gates in gated:
            call = Call(
                *(k_dim, v_dim, 1, 64, with_gates),
                norm=True,
                output=True,
                writes=True,
                products="bf16",
            )
            for name in NAMES:
                kernel = getattr(kernels, name)
                found = variant(
                    kernel,
                    f"k{k_dim}_v{v_dim}",
                    {**call.constants(name), **call.launch(name)},
                    {argument: _type(argument) for argument in kernel.arg_names},
                    () if with_gates else _OF_GATES,
                    products=name != "invert",
                    may_spill=k_dim > 128,
                )
                yield found._replace(name=f"{'gated_' * with_gates}delta_rule_{found.name}")


def _type(argument: str) -> str:
    if argument in ("n", "H") or argument.startswith("stride"):
        return "i32"
    if argument in ("scale", "eps"):
        return "fp32"
    if argument == "slots":
        return "*i32"
    return "*bf16" if argument in (*_SCRATCH, *_AS_INPUTS) else "*fp32"
