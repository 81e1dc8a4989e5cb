"""JSON that says beside its figures on which machine and with which versions they were made."""

from __future__ import annotations

import json
import os
import platform as python_platform
from importlib import metadata
from pathlib import Path
from typing import Any

from refine_mcore import platform
from refine_mcore.config import Config, to_dict
from refine_mcore.files import written_whole

_PACKAGES = ("torch", "megatron-core", "triton", "flash-linear-attention", "transformer-engine")


def write_report(output: Path, report: dict[str, Any], config: Config) -> None:
    """Write `report` with the machine, the versions and the configuration; by rename."""
    write_json(output, report, config=to_dict(config))


def write_json(output: Path, report: dict[str, Any], **more: Any) -> None:
    """Write `report` with the machine, the versions and what else is given; by rename. Raises
    UserError if that fails."""
    report = report | {"machine": _machine(), "versions": _versions()} | more
    with written_whole(output) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")


def _machine() -> dict[str, Any]:
    import torch

    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if platform.device().type == "cuda":
        machine["accelerator"] = torch.cuda.get_device_name()
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return python_platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else python_platform.processor()


def _versions() -> dict[str, str]:
    versions = {"python": python_platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
