"""Steps in processes of their own: on the CPU of a GPU machine, or on several ranks.

`python -m refine_mcore.benchmark.gpu_check.worker ROOT SCRATCH LAYOUT...` is the life of a rank;
the first one leaves the results of every layout and family in SCRATCH.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from torch import Tensor

from refine_mcore import platform

if TYPE_CHECKING:
    from refine_mcore.benchmark.gpu_check.jobs import Texts

_COLLECTIVE_TIMEOUT_SECONDS = 60.0
_TIMEOUT_SECONDS = 150.0  # of all that a group of ranks has to do
_SHOWN_LINES = 4


class Workers:
    """Ranks that run a fused step of every family at each of `layouts`, side by side with the
    process that starts them; none outlives the context."""

    def __init__(
        self, texts: Texts, layouts: Sequence[str], *, ranks: int, hide_gpus: bool
    ) -> None:
        self._scratch = texts.scratch
        # The store takes a free port of its own choice, and the ranks connect to it as they would
        # to torchrun's.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        command = [sys.executable, "-m", __name__, str(texts.root), str(texts.scratch), *layouts]
        self._processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            if hide_gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ""
            with self._log(rank).open("w") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def join(self) -> None:
        """Wait for all ranks. Raises RuntimeError with the last lines of one that failed, or if
        they take too long."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while any(process.poll() is None for process in self._processes):
            if any(process.poll() for process in self._processes):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"the ranks took over {_TIMEOUT_SECONDS:.0f} s")
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(self._processes) if process.poll()]
        if failed:
            lines = self._log(failed[0]).read_text().strip().splitlines()[-_SHOWN_LINES:]
            raise RuntimeError(f"rank {failed[0]} failed: {' / '.join(lines)}")

    def results(self, layout: str, family: str) -> dict[str, Tensor]:
        """As `step_results`."""
        return torch.load(_results_file(self._scratch, layout, family), weights_only=True)

    def _log(self, rank: int) -> Path:
        return self._scratch / f"rank-{rank}.log"


def _results_file(scratch: Path, layout: str, family: str) -> Path:
    return scratch / f"{layout} {family}.pt"


def main(argv: list[str]) -> None:
    """One rank."""
    root, scratch, layouts = Path(argv[0]), Path(argv[1]), argv[2:]
    # one of the layouts is a pipeline over all ranks
    platform.let_messages_overlap(int(os.environ["WORLD_SIZE"]))
    torch.set_num_threads(1)
    platform.initialize()
    # imports Megatron
    from refine_mcore.benchmark.gpu_check.jobs import FAMILIES, Texts, step_results, tiny_job

    gc.freeze()  # what is imported stays: the collection at the end of a layout need not look at it
    with platform.distributed(_COLLECTIVE_TIMEOUT_SECONDS):
        for layout in layouts:
            for family in FAMILIES:
                found = step_results(tiny_job(Texts(root, scratch), family, layout), "fused")
                if dist.get_rank() == 0:
                    torch.save(found, _results_file(scratch, layout, family))


if __name__ == "__main__":
    main(sys.argv[1:])
