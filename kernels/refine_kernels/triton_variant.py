"""A Triton kernel as it is compiled ahead of time, for machines without a GPU.

Holds what triton.compiler.ASTSource and triton.compile take.  Nothing at run time reads this:
there, Triton compiles what a call needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_LAUNCH = ("num_warps", "num_stages")


class Variant(NamedTuple):
    """A kernel and what it is compiled for."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]  # addresses and strides divide by 16
    options: dict[str, int]  # warps and pipeline stages
    products: bool = False  # multiplies matrices, which belongs on tensor cores
    may_spill: bool = False  # on a chip where it would not fit otherwise
    few_rows: bool = False  # less than the tensor cores' newest instructions take


def variant(
    kernel: Any,
    title: str,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    without: Sequence[str] = (),
    *,
    products: bool = False,
    may_spill: bool = False,
    few_rows: bool = False,
) -> Variant:
    """Compiled with these constants, warps and stages.  ``types`` are those of the arguments that
    are no bfloat16 tensors; arguments ``without`` a value are None."""
    constexprs = {name: x for name, x in constants.items() if name in kernel.arg_names}
    constexprs |= {name: None for name in without if name in kernel.arg_names}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constexprs:
            signature[argument] = "constexpr"
            continue
        stride = argument.startswith("stride")
        signature[argument] = types.get(argument, "i32" if stride else "*bf16")
        if signature[argument].startswith("*") or stride:
            attributes[i,] = [["tt.divisibility", 16]]
    options = {name: constants[name] for name in _LAUNCH if name in constants}
    name = f"{kernel.fn.__name__}_{title}"
    return Variant(
        *(name, kernel, signature, constexprs, attributes, options),
        *(products, may_spill, few_rows),
    )


def integers(*names: str) -> dict[str, str]:
    """The type of arguments of these names."""
    return dict.fromkeys(names, "i32")
