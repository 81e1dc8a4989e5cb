"""One Megatron world of one rank, and each small model built once, for a whole file of tests."""

from collections.abc import Callable, Iterator

import pytest

from refine_mcore import platform
from refine_mcore.models.fast_weight_model import FastWeightModel
from tests.models.zoo import make_model, short_chunks


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


@pytest.fixture(name="short_chunks")
def _short_chunks() -> Iterator[None]:
    """As zoo.py has them, for a test."""
    with short_chunks():
        yield
