"""LaCT with what stands between its products in Triton: see forms.py.  The products are the
libraries', as elsewhere.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from refine_kernels import agreement
from refine_kernels.lact import chunk, forms, triton_gates, triton_moved
from refine_kernels.lact.fast_weights import FastWeights
from refine_kernels.lact.forms import Forms
from refine_kernels.lact.products import Precision, product_in
from refine_kernels.triton_variant import Variant

_WIDEST = 8192


def refusal(*arguments: Any, precision: Precision | None = None, **options: Any) -> str | None:
    """Why the kernels are not for these arguments of chunk.py's operations here, None if they
    are."""
    given = (*arguments, *options.values())
    weights = next(x for x in given if isinstance(x, FastWeights))
    tokens = next(x for x in given if isinstance(x, Tensor))
    if weights.w1.dtype != torch.float32 or tokens.dtype not in agreement.TOLERANCE:
        return f"tokens are {tokens.dtype} and fast weights {weights.w1.dtype}"
    width = max(weights.w1.shape[-2:])
    if width > _WIDEST:
        return f"the fast network is {width} wide, above {_WIDEST}"
    operands = product_in(precision, tokens.dtype, torch.float32).operands
    return _disagreement(width, operands, tokens.device)


@functools.cache
def _disagreement(width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    gen = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(2, 2, 5, size, generator=gen).to(device, dtype)
        for name, size in (("zh", 2 * width), ("d", width))
    }
    inputs["rates"] = torch.rand(2, 5, 2, 3, generator=gen).to(device)
    for name in ("weight", "step"):
        inputs[name] = torch.randn(2, 2, 5, width, generator=gen).to(device)
    inputs["norm"] = torch.rand(1, 2, 5, 1, generator=gen).to(device)

    def of(forms: Forms) -> agreement.Form:
        def run(
            zh: Tensor, d: Tensor, lr: Tensor, weight: Tensor, step: Tensor, norm: Tensor
        ) -> list[Tensor]:
            weights, _, used = forms.moved(weight, step, norm, dtype, prenorm=False)
            raw, scale, scaled = forms.moved(weight, step, norm, dtype, prenorm=True)
            assert scale is not None
            gates = [forms.hidden(zh, dtype), *forms.factors(zh, d, lr, dtype)]
            operands = weights if used is None else used, raw * scale if scaled is None else scaled
            return [*gates, raw, scale, weights, *operands]

        return run

    return agreement.disagreement(
        of(FORMS),
        of(forms.BY_TORCH),
        inputs,
        [
            "hidden state",
            "factors of w0 and w2",
            "factor of w1",
            "moved weight",
            "scale of its rows",
            "moved weight of the rows' norms",
            "moved weight in products",
            "moved and scaled weight in products",
        ],
        tolerance=agreement.TOLERANCE[dtype],
    )


FORMS = Forms(triton_gates.hidden, triton_gates.factors, triton_moved.moved)
apply_fast_weights = functools.partial(chunk.apply_fast_weights, forms=FORMS)
update_fast_weights = functools.partial(chunk.update_fast_weights, forms=FORMS)
chunk_lact = functools.partial(chunk.chunk_lact, forms=FORMS)

# Widths of a fast head in the published models.
_COMPILED = (384, 768)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time."""
    yield from triton_gates.variants(_COMPILED)
    yield from triton_moved.variants(_COMPILED)
