"""Whether two forms of an operation agree on a small problem, gradients too.

A miscompiled kernel raises no error: a form is compared with torch's before a run trusts it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Largest relative difference (of norms) that passes, by the dtype of the inputs.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def unknown_dtype(dtype: torch.dtype) -> str | None:
    """Why kernels are not for inputs of this dtype, None if they are."""
    if dtype in TOLERANCE:
        return None
    return f"{dtype} is none of bfloat16, float16 and float32"


Form = Callable[..., Sequence[Tensor]]


def disagreement(
    form: Form,
    by_torch: Form,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    tolerance: float,
    gradients: bool = True,
) -> str | None:
    """What differs most between the two forms, of ``outputs`` and, unless they have none, of the
    gradients of all floating ``inputs``, if it is more than ``tolerance``; or why the form does
    not run here: a kernel may need more than the chip has, or a compiler that is missing.

    Both take the inputs in their order; torch's gets the same numbers in float32.  The gradients
    are those of a random projection of the outputs.  Whoever asks may be inside autograd's hooks;
    what is kept here is none of theirs.
    """
    device = next(iter(inputs.values())).device
    gen = torch.Generator().manual_seed(0)
    weights: list[Tensor] = []
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        torch.autocast(device.type, enabled=False),
        saved_tensors_hooks(_same, _same),
    ):

        def results_of(run: Form, widen: bool) -> list[Tensor]:
            given = [_leaf(x, widen) for x in inputs.values()]
            found = list(run(*given))
            while len(weights) < len(found):
                shape = found[len(weights)].shape
                weights.append(torch.randn(shape, generator=gen).to(device))
            if not gradients:
                return found
            pairs = zip(found, weights, strict=True)
            total: Any = sum((x.float() * w).sum() for x, w in pairs if x.requires_grad)
            leaves = [x for x in given if x.requires_grad]
            return found + list(torch.autograd.grad(total, leaves))

        expected = results_of(by_torch, True)
        try:
            actual = results_of(form, False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, a driver, another package
            first = next(iter(str(error).splitlines()), "")
            return f"on this machine the kernels do not run ({type(error).__name__}: {first})"
    floating = [name for name, x in inputs.items() if gradients and x.is_floating_point()]
    names = [*outputs, *(f"gradient of {name}" for name in floating)]
    errors = {
        name: ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
        for name, found, wanted in zip(names, actual, expected, strict=True)
    }
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    if errors[worst] <= tolerance:
        return None
    return f"on this machine the kernels' {worst} differs from torch's by {errors[worst]:.1e}"


def _same(x: Tensor) -> Tensor:
    return x


def _leaf(x: Tensor, widen: bool) -> Tensor:
    x = x.detach().clone()
    if not x.is_floating_point():
        return x
    return (x.float() if widen else x).requires_grad_()
