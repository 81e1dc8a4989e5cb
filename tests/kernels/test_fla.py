"""flash-linear-attention as a form of the delta rules. The package itself needs a GPU: here a
stand-in computes what its documentation says, by the definition."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from refine_kernels import dispatch
from refine_kernels.delta_rule import fla_chunk
from refine_kernels.delta_rule.naive import naive_delta_rule, naive_gated_delta_rule
from torch import Tensor


def documented(gated: bool, spoiled: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """As many key heads as value heads; a norm of queries and keys with its own epsilon."""

    def rule(
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        scale: float | None,
        initial_state: Tensor,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool,
        **decays: Tensor,
    ) -> Any:
        assert q.shape == k.shape and q.shape[2] == v.shape[2] and output_final_state
        assert set(decays) == ({"g"} if gated else set())
        if use_qk_l2norm_in_kernel:
            q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        form: Any = naive_gated_delta_rule if gated else naive_delta_rule
        o, state = form(q, k, v, beta, *decays.values(), scale=scale, initial_state=initial_state)
        return spoiled(o.to(v.dtype)), state

    return rule


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A stand-in for the package, and what it does wrong."""

    def install(spoiled: Callable[[Tensor], Tensor] = lambda o: o) -> None:
        for name in ("delta_rule", "gated_delta_rule"):
            module: Any = ModuleType(f"fla.ops.{name}")
            setattr(module, f"chunk_{name}", documented(name.startswith("gated"), spoiled))
            monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
        fla_chunk._disagreement.cache_clear()

    return install


def inputs(groups: int, gated: bool) -> list[Tensor]:
    gen = torch.Generator().manual_seed(groups)
    q, k = (torch.randn(2, 37, 2, 8, dtype=torch.float64, generator=gen) for _ in range(2))
    k /= 3  # without a norm larger ones let states explode
    v = torch.randn(2, 37, 2 * groups, 6, dtype=torch.float64, generator=gen)
    rates = [torch.randn(2, 37, 2 * groups, dtype=torch.float64, generator=gen).sigmoid()]
    rates += [-rates[0].log1p()] if gated else []
    state = torch.randn(2, 2 * groups, 8, 6, dtype=torch.float64, generator=gen)
    return [x.requires_grad_() for x in (q, k, v, *rates, state)]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_asked_for_the_same(installed: Any, groups: int, gated: bool, norm: bool) -> None:
    installed()
    *given, state = leaves = inputs(groups, gated)
    name = "chunk_gated_delta_rule" if gated else "chunk_delta_rule"
    found = []
    for module in (fla_chunk, dispatch):
        form: Any = getattr(module, name)
        out = form(*given, qk_norm_eps=1e-6 if norm else None, initial_state=state)
        grads = torch.autograd.grad(out.o.sin().sum() + out.final_state.cos().sum(), leaves)
        found.append((out.o, out.final_state, *grads))
    torch.testing.assert_close(*found)


def test_when_it_is_not_for_the_arguments() -> None:
    q, k, v, beta, _ = (x.detach() for x in inputs(1, False))
    refusal: Any = fla_chunk.refusal
    assert refusal(q, k, v, beta, output_writes=True).endswith("gives no writes")
    assert refusal(None, k, v, beta).endswith("takes no text without queries")
    assert refusal(*(x[:, :5] for x in (q, k, v, beta))).endswith("one launch in Triton")
    assert refusal(q, k, v, beta).endswith("runs on a GPU")


@pytest.mark.parametrize("gated", [True, False])
def test_what_differs_from_torch_is_refused(installed: Any, gated: bool) -> None:
    kind = (8, 6, 2), gated, 1e-6, torch.float16, torch.device("cpu")
    installed()
    assert fla_chunk._disagreement(*kind) is None
    for spoiled, why in (
        (lambda o: o + 0.1 * o.detach(), "output differs from torch's"),
        (lambda o: o + 0.1 * (o - o.detach()), "gradient of "),
    ):
        installed(spoiled)
        found = fla_chunk._disagreement(*kind)
        assert found is not None and why in found
    sys.modules.pop("fla.ops.delta_rule")
    sys.modules.pop("fla.ops.gated_delta_rule")
    fla_chunk._disagreement.cache_clear()
    assert "No module named 'fla'" in str(fla_chunk._disagreement(*kind))
    fla_chunk._disagreement.cache_clear()


def test_texts_that_it_does_not_take_are_the_next_forms(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of states that are read; torch's here, on a GPU the kernels'."""
    installed()
    refusal = fla_chunk.refusal
    monkeypatch.setattr(
        fla_chunk,
        "refusal",
        lambda *x, **kw: refusal(*x, **kw) if kw.get("output_writes") else None,
    )
    q, k, v, beta, _ = inputs(1, False)
    dispatch.use(delta_rule="fla")
    try:
        dispatch.chunk_delta_rule(q, k, v, beta)
        assert dispatch.ran()["chunk_delta_rule on cpu"] == "fla"
        dispatch.chunk_delta_rule(q, k, v, beta, output_writes=True)
        assert dispatch.ran()["chunk_delta_rule on cpu"].startswith("torch, as ")
        dispatch.recurrent_delta_rule(q, k, v, beta)
        assert dispatch.ran()["recurrent_delta_rule on cpu"].startswith("torch, as ")
    finally:
        dispatch.use()
