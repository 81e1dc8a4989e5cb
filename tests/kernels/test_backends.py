"""A whole step by the Triton kernels against the same step in plain torch."""

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from refine_kernels import dispatch
from torch import Tensor

from refine_mcore.benchmark.gpu_check.jobs import Texts, step_results, tiny_job
from refine_mcore.benchmark.gpu_check.steps import step_differences
from refine_mcore.config.schema import KernelsConfig
from refine_mcore.evaluation.differences import relative

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from refine_kernels.short_conv import triton_conv

from tests.kernels.interpreter import interpreter_and_poison  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Texts:
    # the interpreter takes its time for each
    monkeypatch.setattr(triton_conv, "_TOKENS", 128)
    monkeypatch.setattr(triton_conv, "_TILE", 128 * 128)
    texts = Texts(ROOT, tmp_path)
    texts.write_short_text()
    return texts


def step(texts: Texts, family: str, form: Any, mode: str, dtype: Any) -> dict[str, Tensor]:
    """Losses, rewards, positions, rollout tokens and every gradient of a step on one text."""
    job = tiny_job(texts, family)
    training = replace(job.training, dtype=dtype, global_batch_size=1)
    chosen: Any = {n: form if form == "torch" else other for n, other in dispatch.ON_A_GPU.items()}
    kernels = KernelsConfig(**chosen)
    dispatch._log_backend.cache_clear()
    return step_results(replace(job, training=training, kernels=kernels), mode)


@pytest.mark.parametrize(
    "family",
    [
        "hybrid",
        "lact",
        pytest.param("deltanet", marks=pytest.mark.slow),
        pytest.param("gated-deltanet", marks=pytest.mark.slow),
    ],
)
def test_a_fused_step(caplog, texts, single_rank, family):
    caplog.set_level(logging.INFO, logger="refine_kernels.dispatch")
    expected = step(texts, family, "torch", "fused", "float32")
    caplog.clear()
    found = step(texts, family, "triton", "fused", "float32")
    ran = {r.getMessage().split(" on ")[0] for r in caplog.records if "triton" in r.getMessage()}
    assert ran >= {"rms_norm", "swiglu", "linear_log_probs_and_entropy", "sample_tokens"}
    assert ("chunk_lact" in ran) == (family == "lact")
    differences = step_differences(family, found, expected)
    assert len(differences) > 20
    assert [x for x in differences if not x.holds] == []


def test_gradients_in_bfloat16(texts, single_rank):
    """No further from float32's than twice torch's own rounding: the interpreter cuts off where a
    GPU rounds."""
    exact, by_torch, found = (
        step(texts, "hybrid", form, "ntp", dtype)
        for form, dtype in (("torch", "float32"), ("torch", "bfloat16"), ("triton", "bfloat16"))
    )
    gradients = [name for name in exact if name.startswith("gradient.")]
    assert len(gradients) > 20
    for name in gradients:
        own = relative(name, by_torch[name].float(), exact[name], 1.0, 1e-4).error
        assert own > 0
        error = relative(name, found[name].float(), exact[name], 2 * own, 1e-4)
        assert error.holds, str(error)
