"""Every operation of refine_kernels on the device against its definition on the CPU in float64,
outputs and gradients, with float32 and with bfloat16 inputs.

What is compared is |actual - expected| / |expected| of a whole tensor. The definition gets the
inputs as the operation does, rounded, and the same upstream gradients, so that an error is the
operation's own. Its limit counts roundings. One adds at most the unit roundoff u of its format. Of
n in a row, which is the longest sum or recurrence of a case, as many go up as down, and they add up
to a small multiple of sqrt(n) u (Higham & Mary 2019, "A New Approach to Probabilistic Rounding
Error Analysis"); so they do in any order of summation, and in fewer steps where a device sums by
halves. A term that is missing, misplaced or read too early is off by a hundredth or more.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from refine_kernels import dispatch
from torch import Tensor

from refine_mcore.benchmark.gpu_check.results import FAIL, PASS, Result, compared, raised
from refine_mcore.evaluation.differences import Difference, relative, unequal

Tensors = dict[str, Tensor]
DTYPES = (torch.float32, torch.bfloat16)
_CHAIN_FACTOR = 4.0  # the small multiple: more are as rare as four standard deviations
UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}


@dataclass(frozen=True)
class OpCase:
    """One way to call an operation.

    `inputs` are float64 (or integers), those in `wide` never narrower than float32 in a model.
    `run(operation, inputs)` and `expected(inputs)` give the same named outputs, of which those in
    `without_gradient` have none. The limits count: `chain` roundings in a row to float32, which
    grow `gain` times; `narrow`, each in full, to the dtype of the inputs where that is narrower;
    and what products in a format of their own add.
    """

    operation: str
    variant: str
    inputs: Tensors
    run: Callable[[Callable[..., Any], Tensors], Tensors]
    expected: Callable[[Tensors], Tensors]
    chain: int
    narrow: int = 1
    gain: float = 1.0
    product_roundoff: float = 0.0
    wide: frozenset[str] = frozenset()
    without_gradient: frozenset[str] = frozenset()
    narrow_in_triton: int | None = None  # in place of `narrow`, where the Triton form runs
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def limit(self, dtype: torch.dtype, device_type: str = "cpu") -> float:
        """Of the relative errors with inputs of `dtype` on a device of this type."""
        narrow = self.narrow
        if self.narrow_in_triton and dispatch.backend("delta_rule", device_type) == "triton":
            narrow = self.narrow_in_triton
        chain = _CHAIN_FACTOR * math.sqrt(self.chain) * UNIT_ROUNDOFF[torch.float32]
        limit = self.gain * chain + self.product_roundoff
        return limit if dtype == torch.float32 else limit + narrow * UNIT_ROUNDOFF[dtype]


def operations() -> list[str]:
    """What `refine_kernels.dispatch` exports, but for types."""
    exported = {name: getattr(dispatch, name) for name in dispatch.__all__}
    return [
        name
        for name, value in exported.items()
        if not inspect.isclass(value) and typing.get_origin(value) is None
    ]


def check_operations(device: torch.device, cases: Mapping[str, list[OpCase]]) -> Iterator[Result]:
    """A row that every operation has a case, and one for each operation."""
    names = operations()
    forgotten = [name for name in names if not cases.get(name)]
    if forgotten:
        found = f"no case in op_cases.py for {', '.join(forgotten)}"
        yield Result("every operation has a case", FAIL, found)
    else:
        yield Result("every operation has a case", PASS, f"{len(names)} operations")
    for name in names:
        if name not in forgotten:
            yield _check_operation(name, cases[name], device)


def _check_operation(name: str, cases: list[OpCase], device: torch.device) -> Result:
    differences: list[Difference] = []
    try:
        for case in cases:
            for dtype in case.dtypes:
                differences += differences_of(case, dtype, device)
    except Exception as error:  # says nothing of the other operations
        return raised(name, error)
    return compared(name, differences)


def differences_of(case: OpCase, dtype: torch.dtype, device: torch.device) -> list[Difference]:
    """Outputs and gradients of one case with inputs of `dtype` on `device`."""
    label = " ".join(filter(None, (case.variant, str(dtype).removeprefix("torch."))))
    limit = case.limit(dtype, device.type)
    inputs = {
        name: _rounded(x, torch.float32 if name in case.wide else dtype)
        for name, x in case.inputs.items()
    }
    exact = _leaves({n: x.double() if x.is_floating_point() else x for n, x in inputs.items()})
    here = _leaves({name: x.to(device) for name, x in inputs.items()})
    expected = case.expected(exact)
    actual = case.run(getattr(dispatch, case.operation), here)
    found = [
        relative(f"{label} {name}", actual[name], value, limit)
        if value.is_floating_point()
        else unequal(f"{label} {name}", actual[name], value)
        for name, value in expected.items()
    ]
    traced = [
        name
        for name, value in expected.items()
        if value.is_floating_point() and name not in case.without_gradient
    ]
    cut = [name for name in traced if not actual[name].requires_grad]
    if cut:
        found.append(Difference(f"{label} no gradient through {cut[0]}", math.inf, limit))
    elif traced and all(d.holds for d in found):
        theirs = _gradients(expected, traced, actual, exact)
        for name, gradient in _gradients(actual, traced, actual, here).items():
            found.append(relative(f"{label} gradient of {name}", gradient, theirs[name], limit))
    return found


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _leaves(tensors: Tensors) -> Tensors:
    """The same tensors, those of floating point as leaves of a graph."""
    return {
        name: x.detach().requires_grad_() if x.is_floating_point() else x
        for name, x in tensors.items()
    }


def _gradients(outputs: Tensors, names: list[str], like: Tensors, leaves: Tensors) -> Tensors:
    """Of a fixed random projection of the outputs `names`, rounded to the dtypes that they have in
    `like`."""
    generator = torch.Generator().manual_seed(1)
    upstream = []
    for name in names:
        weights = torch.randn(like[name].shape, generator=generator, dtype=torch.float64)
        upstream.append(weights.to(like[name].dtype).to(outputs[name]))
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(
        [outputs[name] for name in names],
        list(wanted.values()),
        upstream,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wanted, found, strict=True))
