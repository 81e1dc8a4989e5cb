"""Start programs under torchrun from within a test, as on one or several nodes."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

from tests.training.jobs import ROOT

MAIN_JOB = ROOT / "examples" / "pretrain_refine.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# Marks a process and all that descend from it, those too that outlive their parent.
_MARK = "REFINE_TEST_PROGRAM"


@dataclass(frozen=True)
class Finished:
    """A program that has ended: exit code, its stdout and stderr together, and when (Unix time)."""

    code: int
    output: str
    ended: float


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that a server may listen on, and nobody else is given meanwhile.

    From 20000 to 29999, where examples/slurm looks for ports too.
    """
    with socket.socket() as holder:
        for port in random.SystemRandom().sample(range(20000, 30000), 100):
            with contextlib.suppress(OSError):
                holder.bind(("127.0.0.1", port))
                break
        else:
            raise OSError("no free port")
        # Set after binding: we took the port for ourselves alone, and now admit one listener that
        # sets this too, as torch's does.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield port


def run_nodes(nodes: int, ranks_per_node: int, *program: object, timeout: float) -> list[Finished]:
    """Run `program` under as many torchrun agents, which meet as those of several nodes would."""
    with reserved_port() as port:
        agent = (
            *TORCHRUN,
            *("--nnodes", nodes, "--nproc-per-node", ranks_per_node),
            *("--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint"),
            f"127.0.0.1:{port}",
            *program,
        )
        return run_programs([agent] * nodes, timeout=timeout)


def run_programs(
    commands: Sequence[Sequence[object]], timeout: float, **environment: str
) -> list[Finished]:
    """Run the commands side by side from the repository's root until all have ended.

    Fails if one takes over `timeout` seconds, or if a process is left a few seconds after the last
    has ended. Nothing is left behind in any case.
    """
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "OMP_NUM_THREADS": "1",
        **environment,
        _MARK: mark,
    }
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        # Files and not pipes: a program must not wait for us to read another's output.
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        stack.callback(_kill, mark)
        programs = [
            subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for command, output in zip(commands, outputs, strict=True)
        ]
        finished = []
        for program, output in zip(programs, outputs, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(max(0.0, started + timeout - time.monotonic()))
            in_time = program.poll() is not None
            if not in_time:
                _kill(mark)
                program.wait()
            ended = time.time()
            output.seek(0)
            text = output.read().decode(errors="replace")
            assert in_time, f"not ended after {timeout:.0f} s:\n{text}"
            finished.append(Finished(program.returncode, text, ended))
        deadline = time.monotonic() + 5
        while (left_behind := _marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left_behind, f"left behind: {left_behind}"
    return finished


def _kill(mark: str) -> None:
    for process in _marked(mark):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _marked(mark: str) -> list[psutil.Process]:
    """The processes that carry the mark and still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
