"""One Megatron world of one rank, and each small model built once, for a whole file of tests."""

from collections.abc import Callable, Iterator

import pytest

from refine_mcore import platform
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.transformer_config import FastWeightConfig
from tests.models.zoo import make_model


@pytest.fixture(scope="module")
def process_groups() -> Iterator:
    """Megatron's process groups for a world of one."""
    platform.initialize()
    platform.init_distributed(timeout_s=60)
    yield platform.initialize_model_parallel(seed=0)
    platform.shutdown()


@pytest.fixture(scope="module")
def model_of(process_groups) -> Callable[[str], FastWeightModel]:
    """`model_of(name)`: the small model of that name in float64; the same object at every call."""
    models: dict[str, FastWeightModel] = {}

    def get(name: str) -> FastWeightModel:
        if name not in models:
            models[name] = make_model(name, process_groups)
        return models[name]

    return get


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delta-rule chunks of 4 tokens instead of 64, and a state kept at every second one, so that
    short texts have several."""
    monkeypatch.setattr("refine_mcore.models.delta_rule_mixer.KERNEL_CHUNK", 4)
    # a property takes precedence over what each configuration holds
    interval = property(lambda config: 8, lambda config, value: None)
    monkeypatch.setattr(FastWeightConfig, "tape_interval", interval)
