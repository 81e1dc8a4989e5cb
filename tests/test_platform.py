"""The seam on one rank; two ranks are in tests/distributed/test_platform.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refine_mcore import compat, platform
from refine_mcore.errors import UserError
from tests.training.jobs import ROOT, write_config

_WORLD_OF_ONE = """
from refine_mcore import platform

def main():
    platform.initialize()
    platform.init_distributed(timeout_s=60)
    groups = platform.initialize_model_parallel(seed=1)
    assert groups.tp.size() == groups.pp.size() == groups.dp.size() == 1
    import megatron.core.models.gpt.gpt_layer_specs
    platform.shutdown()

main()
"""


def test_plain_processes_side_by_side_need_no_launcher_and_say_nothing() -> None:
    """No environment, no port in common, and none of Megatron's import warnings."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORLD_OF_ONE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output.decode()
        assert output == b""


def test_device_and_backend_belong_together() -> None:
    expected = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    assert (platform.device().type, platform.backend()) == expected


def test_pipelines_on_gpus_get_queues_and_loaded_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    queues, loading = "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING"
    for name in (queues, loading):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setattr(platform, "backend", lambda: "nccl")
    platform.let_messages_overlap(stages=1)
    assert not {queues, loading} & os.environ.keys()
    platform.let_messages_overlap(stages=2)
    assert (os.environ[queues], os.environ[loading]) == ("32", "EAGER")
    for value in ("1", "8", "many"):
        monkeypatch.setenv(queues, value)
        with pytest.raises(UserError, match=f"CUDA_DEVICE_MAX_CONNECTIONS, which is {value}, or"):
            platform.let_messages_overlap(stages=2)
    monkeypatch.setattr(platform, "backend", lambda: "gloo")
    platform.let_messages_overlap(stages=2)


_TRANSFORMER_ENGINE = """
import os

expected = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
found = {name: os.environ.get(name) for name in expected}
raise SystemExit(42 if found == expected else f"imported too early: {found}")
"""


@pytest.mark.parametrize(
    "program",
    ["pretrain", *(pytest.param(p, marks=pytest.mark.slow) for p in ("score", "benchmark"))],
)
def test_queues_are_set_before_transformer_engine_is_imported(program: str, tmp_path: Path) -> None:
    """It is installed here in name only: its import ends the program, well if it came in time."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(_TRANSFORMER_ENGINE)
    config = write_config(tmp_path)
    command = {
        "pretrain": ("examples/pretrain_refine.py", "--config", config),
        "score": (
            *("tools/score.py", "--checkpoint", tmp_path, "--tokens", config, "--key", "x"),
            *("--output", tmp_path / "output"),
        ),
        "benchmark": ("tools/benchmark_step.py", "--config", config, "--json", tmp_path / "json"),
    }[program]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"}
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *map(str, command), "parallel.pipeline=2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 42, done.stderr


def test_same_seed_same_random_numbers(single_rank) -> None:
    first = torch.rand(3, device=platform.device())
    platform.initialize_model_parallel(seed=0)
    assert torch.equal(torch.rand(3, device=platform.device()), first)
    platform.initialize_model_parallel(seed=1)
    assert not torch.equal(torch.rand(3, device=platform.device()), first)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 3), (0, 1)])
def test_layout_that_does_not_fit_is_refused(single_rank, tensor: int, pipeline: int) -> None:
    with pytest.raises(UserError, match=rf"1 rank.* {tensor} .* x {pipeline} "):
        platform.initialize_model_parallel(tensor=tensor, pipeline=pipeline)


def test_other_megatron_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.metadata, "version", lambda package: "0.19.2")
    with pytest.raises(UserError, match="0.16.1 is required, found: 0.19.2"):
        compat.check_version()


def test_function_without_device_literal_is_refused() -> None:
    """If Megatron changes under the seam, it must not pass over a function in silence."""

    def on_cuda() -> torch.Tensor:
        return torch.zeros(1, device="cuda")

    platform._move_literals_to_cpu(on_cuda)
    assert on_cuda().device.type == "cpu"
    with pytest.raises(RuntimeError, match="on_cuda names no CUDA device"):
        platform._move_literals_to_cpu(on_cuda)
