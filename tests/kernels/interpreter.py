"""Triton kernels without a GPU: Triton's interpreter, and memory that no kernel wrote is NaN, or a
number far below zero.

The interpreter runs one program after another in numpy.  By itself it cuts float32 to bfloat16
where a GPU rounds, which is twice as far off and adds up in sums; here it rounds.  It shows that
the mathematics, the addresses and the masks are right.  It cannot show races between programs or
warps, what shared memory and pipelining do, TF32's rounding, the order of sums, approximate
exponentials, what the compiler makes of the code, or speed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from refine_kernels import dispatch, launch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpreter_and_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs is again the automatic choice afterwards."""
    from triton.runtime import interpreter

    def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        poison = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min + 1
        return torch.full(tuple(shape), poison, dtype=dtype, device=device)

    convert = interpreter._convert_float

    def rounded(x: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if {given.name, wanted.name} != {"fp32", "bf16"}:
            return convert(x, given, wanted, mode)
        if wanted.name == "fp32":
            return x.astype(np.uint32) << 16
        values = torch.from_numpy(np.ascontiguousarray(x)).view(torch.float32)
        return values.bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(launch, "empty", poisoned)
    yield
    dispatch.use()


def leaves(inputs: Sequence[Tensor], **to: Any) -> list[Tensor]:
    return [x.detach().to(**to).requires_grad_() for x in inputs]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a fixed random projection of the outputs, the same in every dtype."""
    gen = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=gen) for x in outputs]
    total = sum((x.double() * w.to(x.device)).sum() for x, w in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs, allow_unused=True))


def assert_near(actual: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    """Of each tensor: the norm of the difference against the norm."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = (a.detach().double().cpu() - e).norm() / e.norm().clamp_min(1e-12)
        assert error <= tolerance, f"tensor {i}: {error:.1e}"  # false for NaN


def compare(
    form: Callable[..., Sequence[Tensor]],
    definition: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Outputs and all gradients of a form in `dtype` against those of a definition in float64."""
    given = [x.to(dtype) for x in inputs]
    exact, actual = leaves(given, dtype=torch.float64), leaves(given, device=DEVICE)
    expected, results = definition(*exact), form(*actual)
    assert all(x.dtype == dtype for x in results if x.dtype != torch.float32)
    assert_near(results, [x.detach() for x in expected], tolerance)
    grads = gradients(results, actual)
    assert [x.dtype for x in grads if x is not None] == [dtype] * len(actual)
    assert_near(grads, gradients(expected, exact), tolerance)
