"""LaCT with what stands between its products in Triton, and Newton-Schulz: see forms.py.  The
products with a chunk's tokens are the libraries', as elsewhere; those with a few tokens are not
(triton_read.py).
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels import agreement
from refine_kernels.lact import (
    chunk,
    forms,
    newton_schulz,
    triton_gates,
    triton_momentum,
    triton_moved,
    triton_newton_schulz,
    triton_read,
)
from refine_kernels.lact.fast_weights import FastWeights, RowNorms
from refine_kernels.lact.forms import Forms
from refine_kernels.lact.products import Precision, product_in
from refine_kernels.triton_variant import Variant

logger = logging.getLogger(__name__)
_WIDEST = 8192


def refusal(
    *arguments: Any,
    precision: Precision | None = None,
    muon: bool = False,
    muon_dtype: torch.dtype | None = None,
    **options: Any,
) -> str | None:
    """Why the kernels are not for these arguments of chunk.py's operations here, None if they
    are."""
    given = (*arguments, *options.values())
    weights = next(x for x in given if isinstance(x, FastWeights))
    tokens = next(x for x in given if isinstance(x, Tensor))
    operands = product_in(precision, tokens.dtype, torch.float32).operands
    updates = any(isinstance(x, RowNorms) for x in given)
    kinds = {torch.float32} if updates else {torch.float32, operands}
    if weights.w1.dtype not in kinds or tokens.dtype not in agreement.TOLERANCE:
        return f"tokens are {tokens.dtype} and fast weights {weights.w1.dtype}"
    width = max(weights.w1.shape[-2:])
    if width > _WIDEST:
        return f"the fast network is {width} wide, above {_WIDEST}"
    why = _disagreement(width, operands, tokens.device)
    if why is None and muon and muon_dtype == triton_newton_schulz.DTYPE:
        why = _newton_schulz_disagreement(width, muon_dtype, tokens.device)
    return why


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
    inputs["of_w02"], inputs["of_w1"] = (
        torch.randn(2, 2, rows, width, generator=gen).to(device, dtype) for rows in (6, 3)
    )
    inputs["decay"] = torch.rand(2, 2, 1, 1, 1, generator=gen).to(device)
    inputs["momentum"] = torch.randn(2, 2, 3, 3, width, generator=gen).to(device)

    def of(forms: Forms) -> agreement.Form:
        def run(*given: Tensor) -> list[Tensor]:
            return [forms.hidden(given[0], dtype), *_Others.apply(forms, dtype, *given)]

        return run

    return agreement.disagreement(
        of(FORMS),
        of(forms.BY_TORCH),
        inputs,
        [
            "hidden state",
            "factors of w0 and w2",
            "factor of w1",
            "moved weight of the rows' norms",
            "moved weight in products",
            "moved weight",
            "moved and scaled weight in products",
            "momentum",
        ],
        tolerance=agreement.TOLERANCE[dtype],
    )


@functools.cache
def _newton_schulz_disagreement(width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    gen = torch.Generator().manual_seed(0)
    inputs = {
        name: (torch.randn(2, width, width, generator=gen) / width**0.5).to(device, dtype)
        for name in "xyps"
    }

    def of(operations: newton_schulz.Operations) -> agreement.Form:
        def run(x: Tensor, y: Tensor, p: Tensor, s: Tensor) -> list[Tensor]:
            p, s = p + p.mT, s + s.mT
            unit, norm = operations.normalised(x, x.dtype)
            return [
                unit,
                operations.normalised_gradient(y, unit, norm),
                operations.symmetric(x),
                operations.symmetric(x, y),
                operations.symmetric(p, base=p, beta=-0.7, alpha=0.3),
                operations.symmetric(p, s, base=p, beta=-0.7, alpha=0.3),
                operations.combined(x, p, beta=1.3),
                operations.combined(x, p, beta=1.3, s=s, y=y),
            ]

        return run

    return agreement.disagreement(
        of(triton_newton_schulz.BY_KERNELS),
        of(newton_schulz.BY_LIBRARY),
        inputs,
        ["unit in Newton-Schulz", "gradient of the norm"]
        + [f"product {i} of Newton-Schulz" for i in range(1, 7)],
        tolerance=agreement.TOLERANCE[dtype],
        gradients=False,
    )


class _Others(torch.autograd.Function):
    """All forms with gradients of their own, as autograd's."""

    @staticmethod
    def forward(ctx: Any, forms: Forms, dtype: torch.dtype, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*given)
        ctx.forms = forms
        zh, d, lr, *_ = given
        found = [*forms.factors(zh, d, lr, dtype)]
        for prenorm in (False, True):
            moved = forms.moved(*given[3:6], dtype, prenorm=prenorm)
            found += [moved.weight, moved.weight * 1 if moved.operand is None else moved.operand]
        return *found, forms.accumulated(*given[6:], torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, forms = ctx.saved_tensors, ctx.forms
        of_gates = forms.factors_gradients(*given[:3], *grads[:2])
        of_weight, of_step, of_norm = (torch.zeros_like(x) for x in given[3:6])
        for of_moved, prenorm in ((grads[2:4], False), (grads[4:6], True)):
            part = torch.empty_like(of_step)
            found, lengths = forms.moved_gradients(*given[3:6], *of_moved, part, prenorm=prenorm)
            of_weight += found
            of_step += part
            of_norm += lengths.sum_to_size(of_norm.shape)
        *of_products, of_momentum, of_decay = forms.accumulated_gradients(
            grads[6], None, *given[8:], given[6].dtype
        )
        of_decay = of_decay.sum(-1)[..., None, None, None]
        of_moved = of_weight, of_step, of_norm
        return None, None, *of_gates, *of_moved, *of_products, of_decay, of_momentum


FORMS = Forms(
    triton_gates.hidden,
    triton_gates.factors,
    triton_gates.factors_gradients,
    triton_momentum.accumulated,
    triton_momentum.accumulated_gradients,
    triton_moved.moved,
    triton_moved.moved_gradients,
    triton_newton_schulz.BY_KERNELS,
)
update_fast_weights = functools.partial(chunk.update_fast_weights, forms=FORMS)
chunk_lact = functools.partial(chunk.chunk_lact, forms=FORMS)


def apply_fast_weights(
    weights: FastWeights, fq: Tensor, *, precision: Precision | None = None
) -> Tensor:
    """As chunk.apply_fast_weights."""
    if triton_read.takes(weights, fq):
        product = product_in(precision, fq.dtype, weights.w1.dtype)
        why = triton_read.refusal(product, weights, fq)
        if why is None:
            return triton_read.read(product, fq, *weights.read())
        _log_products(why)
    return chunk.apply_fast_weights(weights, fq, precision=precision, forms=FORMS)


@functools.cache
def _log_products(why: str) -> None:
    logger.warning("reads of a few tokens are the libraries' products, as %s", why)


# Widths of a fast head in the published models.
_COMPILED = (384, 768)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time."""
    yield from triton_gates.variants(_COMPILED)
    yield from triton_momentum.variants(_COMPILED)
    yield from triton_moved.variants(_COMPILED)
    yield from triton_newton_schulz.variants(_COMPILED)
    yield from triton_read.variants(_COMPILED)
