"""What importing the kernels must and must not do."""

import importlib.util
import logging
from pathlib import Path

import refine_kernels
import torch
from refine_kernels import dispatch

KERNELS = Path(refine_kernels.__file__).parents[1]


def test_kernels_is_not_a_regular_package():
    """A package named kernels would shadow Hugging Face's, which transformers imports."""
    assert KERNELS.name == "kernels"
    assert not (KERNELS / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    found = spec.origin if spec is not None else None
    assert found is None or KERNELS not in Path(found).parents


def test_every_exported_operation_exists():
    assert all(hasattr(dispatch, name) for name in dispatch.__all__)


def test_the_backend_is_logged_once(caplog):
    dispatch._log_backend.cache_clear()
    x, weight = torch.randn(1, 2, 3), torch.randn(3, 1, 4)
    with caplog.at_level(logging.INFO, logger="refine_kernels.dispatch"):
        dispatch.causal_conv1d(x, weight)
        dispatch.causal_conv1d(x=x, weight=weight)
    assert [r.getMessage() for r in caplog.records] == ["causal_conv1d on cpu: torch"]
    assert dispatch.ran()["causal_conv1d on cpu"] == "torch"
