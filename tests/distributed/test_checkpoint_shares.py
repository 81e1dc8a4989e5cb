"""What each of four ranks writes and reads of a checkpoint, and the memory it takes: its own share,
not all there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from refine_mcore.config import load_config
from refine_mcore.training.loop import Run
from tests.distributed.harness import run_distributed
from tests.training.jobs import write_config

RANKS = 4
# Over 100 MB of float32 weights and moments and of bfloat16 weights.
MODEL = "model.overrides={vocab_size: 2048, hidden_size: 512, intermediate_size: 1024}"
OPTIONS = (
    MODEL,
    "training.dtype=bfloat16",
    "training.micro_batch_size=1",
    "training.steps=1",
    "training.ntp_warmup_steps=0",
    "refine.mode=ntp",
    "optimizer.lr_warmup_steps=0",
)


def test_ranks_share_the_work(tmp_path: Path) -> None:
    """Data-parallel ranks hold the same weights, and the same optimizer state or parts of it:
    either way each handles a fourth, in the layout of the save, and at tensor 2 half. Saving takes
    no more than twice that of its memory; so does loading, but for what a whole optimizer has to
    hold."""
    config = write_config(tmp_path)
    run_distributed(_save_and_load, RANKS, config, tmp_path)


def _save_and_load(config: Path, directory: Path) -> None:
    for sharded in (True, False):
        _check(config, directory / str(sharded), sharded)


def _check(config: Path, directory: Path, sharded: bool) -> None:
    option = f"optimizer.use_distributed_optimizer={str(sharded).lower()}"

    def run(*layout: str) -> Any:
        settings = (f"run.directory={directory}", *OPTIONS, option, *layout)
        return Run(load_config(config, settings))

    trained = run()
    with mock.patch.object(trained, "_save", lambda: None):
        trained._steps(mock.Mock(asked=lambda: None))
    peak = _Peak()
    trained._save()
    used = peak.bytes()
    checkpoint = directory / "checkpoints" / "iter_0000001"
    dist.barrier()
    written = [_bytes_of(checkpoint, rank) for rank in range(RANKS)]
    total = sum(written)
    assert total > 100e6
    assert max(written) < 1.15 * total / RANKS, written
    assert used < 2 * total / RANKS, f"{used:,} of {total:,}"
    del trained

    for layout, most in (((), 1.15 / RANKS), (("parallel.tensor=2",), 0.55)):
        read, used = _loading(lambda layout=layout: run(*layout))
        assert 0.5 * total / RANKS < read < most * total, f"{read:,} of {total:,} {layout}"
        if sharded:
            assert used < 2 * most * total, f"{used:,} of {total:,} {layout}"


def _bytes_of(checkpoint: Path, rank: int) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob(f"__{rank}_*.distcp"))


def _loading(build: Any) -> tuple[int, int]:
    """Bytes read from the checkpoint by this rank, and the most that reading took of memory."""
    from refine_mcore.training import loop

    read, memory = [0], [0]
    slice_file, load = FileSystemReader._slice_file, loop.load_training

    def sliced(self: FileSystemReader, file: Any, place: Any) -> Any:
        read[0] += place.length
        return slice_file(self, file, place)

    def loading(*arguments: Any) -> None:
        peak = _Peak()
        load(*arguments)
        memory[0] = peak.bytes()

    with (
        mock.patch.object(FileSystemReader, "_slice_file", sliced),
        mock.patch.object(loop, "load_training", loading),
    ):
        build()
    return read[0], memory[0]


class _Peak:
    """The most memory that this process has held above what it held at first."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self._before = self._status("VmRSS")

    def bytes(self) -> int:
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
