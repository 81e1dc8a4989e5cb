"""What the checks run on: the device, its driver, and the libraries that matter to the step."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from importlib import metadata

import torch

from refine_mcore import platform
from refine_mcore.benchmark.gpu_check.results import ABSENT, FAIL, PASS, Result

# What the step is made of, and what it would use if it is there.
_LIBRARIES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "triton": ("triton",),
    "flash-linear-attention": ("flash-linear-attention",),
    "Transformer Engine": ("transformer-engine", "transformer-engine-torch"),
}


def check_machine() -> Iterator[Result]:
    """Devices that compute, then one row for each library."""
    yield _device()
    for name, packages in _LIBRARIES.items():
        version = next((v for v in map(_version, packages) if v is not None), None)
        if version is None:
            yield Result(name, ABSENT, "not installed")
        else:
            yield Result(name, PASS, version, {"version": version})


def _device() -> Result:
    if platform.device().type != "cuda":
        found = f"the CPU, {torch.get_num_threads()} thread(s); collectives by {platform.backend()}"
        return Result("device", PASS, found, {"device": "cpu"})
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    figures = {
        "devices": [device.name for device in devices],
        "memory_bytes": [device.total_memory for device in devices],
        "compute_capability": [f"{device.major}.{device.minor}" for device in devices],
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
    first = devices[0]
    found = (
        f"{len(devices)} x {first.name}, {first.total_memory / 2**30:.0f} GiB, compute capability "
        f"{first.major}.{first.minor}; driver {figures['driver']}, CUDA {figures['cuda']}, NCCL "
        f"{figures['nccl']}"
    )
    wrong = [
        i
        for i in range(len(devices))
        if torch.ones(1000, device=f"cuda:{i}", dtype=torch.bfloat16).sum().item() != 1000
    ]
    if wrong:
        return Result("device", FAIL, f"device {wrong[0]} cannot add bfloat16: {found}", figures)
    return Result("device", PASS, found, figures)


def _driver() -> str:
    """The version of NVIDIA's driver, if the machine has the program that tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown, as nvidia-smi does not tell"
    return done.stdout.split()[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
