"""The ReFINE step at other layouts against one rank: positions, rollouts, losses, every gradient.

One group of two ranks runs all families; each rank computes the one-rank reference for itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from refine_mcore import platform
from refine_mcore.config import RefineConfig
from refine_mcore.models.architecture import Architecture, AttentionOptions
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.presets import preset
from refine_mcore.models.sharding import full_tensors
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.rollout.branches import Randomness
from refine_mcore.training.refine_loss import TextBatch
from refine_mcore.training.step_modes import StepContext, fused
from tests.distributed.harness import run_distributed

CONFIG = RefineConfig(
    num_chunks=3, rollout_tokens=4, margin_left=3, margin_right=5, rollouts_per_position=2
)


def _families() -> dict[str, Architecture]:
    families = {
        name: preset(f"tiny-{name}").with_overrides({"initializer_range": 0.3})
        for name in ("deltanet", "gated-deltanet", "lact")
    }
    families["lact-qk-norm"] = families["lact"].with_overrides(
        {"mixer.qk_norm": True, "mixer.qkv_bias": True, "vocab_size": 62}
    )
    attention = AttentionOptions(layers=(1,), num_heads=4, num_kv_heads=2, window_size=9)
    families["hybrid"] = replace(families["deltanet"], attention=attention)
    return families


def test_tensor_parallel_equals_one_rank() -> None:
    run_distributed(_tensor_parallel, 2)


def _tensor_parallel() -> None:
    for name, architecture in _families().items():
        sharded, single = _Step(architecture, tensor=2), _Step(architecture, tensor=1)
        if dist.get_rank() == 0:
            _compare(name, single, sharded)


class _Step:
    """Loss, rollouts and whole gradients of one fused step on the same two texts, in fp64.

    Ranks that the layout leaves to data parallelism compute the same texts: each has its share of
    the loss, which is scaled back.
    """

    def __init__(self, architecture: Architecture, tensor: int) -> None:
        groups = platform.initialize_model_parallel(tensor=tensor)
        config = transformer_config(architecture, dtype=torch.float64, tensor_parallel=tensor)
        model = build_model(config, groups)
        initialize(model, seed=1)
        tokens = torch.randint(61, (2, 41), generator=torch.Generator().manual_seed(0))
        batch = TextBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([3, 4]))
        context = StepContext(model, CONFIG, Randomness(seed=1, step=2), groups.dp)
        ((work,),) = fused(context, [batch])
        loss, metrics = work()
        self.loss = loss * groups.dp.size()
        self.loss.backward()
        assert metrics.texts is not None
        self.texts = metrics.texts
        self.gradients = full_tensors(model, _gradient)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _compare(name: str, single: _Step, sharded: _Step) -> None:
    assert torch.equal(sharded.texts.positions, single.texts.positions), name
    assert torch.equal(sharded.texts.tokens, single.texts.tokens), name
    torch.testing.assert_close(sharded.texts.rewards, single.texts.rewards)
    torch.testing.assert_close(sharded.loss, single.loss, rtol=1e-12, atol=0.0)
    assert sharded.gradients.keys() == single.gradients.keys()
    for key, expected in single.gradients.items():
        gradient = sharded.gradients[key][: expected.shape[0]]  # a padded vocabulary is longer
        difference, norm = (gradient - expected).norm(), expected.norm()
        assert difference <= 1e-9 * norm + 1e-13, f"{name} {key}: {difference:.1e} of {norm:.1e}"
