"""A rank that dies, raises or hangs ends the job soon, and torchrun's report says which rank and
why. The main job runs as it is, but for one function of one rank."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.distributed.launcher import MAIN_JOB, TORCHRUN, Finished, run_nodes, run_programs
from tests.training.jobs import write_config

# Every job here must have ended so many seconds after the rank failed.
LIMIT = 60.0
# Allows for the start on a busy machine.
TIMEOUT = 120.0 + LIMIT

# In place of the main job: on rank 1 the given call of the given function fails.
SABOTEUR = """
import functools, importlib, os, pathlib, runpy, signal, sys, time

def sabotage(how, call, target):
    from refine_mcore import platform
    platform.initialize()
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def fails(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != call:
            return function(*args, **kwargs)
        pathlib.Path(__file__).with_name("failed").touch()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        raise RuntimeError("sabotaged " + name)

    static = isinstance(vars(owner)[name], staticmethod)
    setattr(owner, name, staticmethod(fails) if static else fails)

if __name__ == "__main__":
    job, how, call, target, *sys.argv[1:] = sys.argv[1:]
    if os.environ["RANK"] == "1":
        sabotage(how, int(call), target)
    runpy.run_path(job, run_name="__main__")
"""

# A rank that hangs takes torchrun's SIGTERM for a request to save, and no option shortens the 30
# seconds until it is killed.
IMPATIENT_TORCHRUN = (
    sys.executable,
    "-c",
    "from torch.distributed.elastic.multiprocessing.api import PContext; "
    "PContext.close.__defaults__ = (None, 3); "
    "from torch.distributed.run import main; main()",
)

# By phase, the call that fails and its function.
PHASES = {
    "start": (1, "refine_mcore.training.loop:training_model"),
    "forward": (2, "refine_mcore.models.fast_weight_block:FastWeightLayer.forward"),
    "rollout": (2, "refine_mcore.pipeline.branch_passes:BranchPasses.decode"),
    "backward": (
        2,
        "megatron.core.tensor_parallel.layers:"
        "LinearWithGradAccumulationAndAsyncCommunication.backward",
    ),
    "message": (2, "refine_mcore.pipeline.channels:Channels.take"),
    "reduction": (2, "megatron.core.distributed:DistributedDataParallel.finish_grad_sync"),
    "optimizer": (2, "megatron.core.optimizer.optimizer:FP32Optimizer.step_with_ready_grads"),
    "save": (
        1,
        "megatron.core.dist_checkpointing.strategies.filesystem_async:"
        "FileSystemWriterAsync.prepare_write_data",
    ),
}
# The cases that always run; the others are slow.
QUICK = {("kill", "message"), ("raise", "optimizer"), ("hang", "rollout")}
CASES = [
    pytest.param(
        how, phase, id=f"{how}-{phase}", marks=() if (how, phase) in QUICK else pytest.mark.slow
    )
    for how, phases in (
        ("kill", PHASES),
        ("raise", PHASES),
        ("hang", ("start", "rollout", "message", "save")),
    )
    for phase in phases
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def sabotaged_job(how: str, phase: str, config: Path, directory: Path) -> tuple[object, ...]:
    """The job of two ranks whose rank 1 fails, tensor parallel or, to have messages, a pipeline."""
    saboteur = directory / "saboteur.py"
    saboteur.write_text(SABOTEUR)
    job = (MAIN_JOB, how, *PHASES[phase], "--config", config, f"run.directory={directory / 'run'}")
    # Only a rank that hangs needs a timeout: without one every other failure must be noticed too.
    timeout = ("parallel.timeout=10",) if how == "hang" else ()
    layout = "parallel.pipeline=2" if phase == "message" else "parallel.tensor=2"
    length = ("training.steps=2", "checkpoint.save_interval=1")
    return (saboteur, *job, layout, *length, *timeout)


def ended_in_time(agent: Finished, directory: Path) -> str:
    """Asserts that the job of `sabotaged_job` failed within the limit; what the agent says."""
    failed = directory / "failed"
    assert failed.exists(), agent.output
    assert agent.code != 0
    assert agent.ended < failed.stat().st_mtime + LIMIT
    return agent.output


def root_cause(output: str) -> str:
    """What an agent reports as the first failure among its ranks."""
    return output.partition("Root Cause (first observed failure):")[2]


@pytest.mark.parametrize("how, phase", CASES)
def test_a_rank_that_fails_ends_the_job(how: str, phase: str, config: Path, tmp_path: Path) -> None:
    job = sabotaged_job(how, phase, config, tmp_path)
    launcher = IMPATIENT_TORCHRUN if how == "hang" else TORCHRUN
    [agent] = run_programs([(*launcher, "--standalone", "--nproc-per-node", 2, *job)], TIMEOUT)
    output = ended_in_time(agent, tmp_path)
    cause = root_cause(output)
    if how == "kill":
        assert "rank      : 1 " in cause and "(SIGKILL)" in cause
    elif how == "raise":
        assert "rank      : 1 " in cause and "RuntimeError: sabotaged" in cause
        assert "[rank1]: RuntimeError: sabotaged" in output
    else:
        assert "rank      : 0 " in cause
        assert "Timed out waiting 10000ms" in cause
        assert "did not get here within parallel.timeout seconds" in cause
    # The other rank has lost its peer, and keeps that to itself.
    assert how == "hang" or "[rank0]: Traceback" not in output


@pytest.mark.parametrize("how", ["raise", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_rank_that_fails_ends_the_other_nodes(how: str, config: Path, tmp_path: Path) -> None:
    agents = run_nodes(2, 1, *sabotaged_job(how, "optimizer", config, tmp_path), timeout=TIMEOUT)
    outputs = [ended_in_time(agent, tmp_path) for agent in agents]
    causes = [cause for cause in map(root_cause, outputs) if "rank      : 1 " in cause]
    assert len(causes) == 1
    assert ("RuntimeError: sabotaged" if how == "raise" else "(SIGKILL)") in causes[0]
    # The other node ends with its ranks, or before them if the one that failed was the meeting
    # point of both.
    [lost] = [output for output in outputs if causes[0] not in output]
    assert "Another rank failed" in lost or "RendezvousConnectionError" in lost
