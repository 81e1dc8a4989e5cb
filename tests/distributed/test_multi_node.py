"""The main job on several nodes: two torchrun agents that meet on the loopback interface, started
by hand or by the Slurm script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launcher import (
    MAIN_JOB,
    TORCHRUN,
    Finished,
    reserved_port,
    run_nodes,
    run_programs,
)
from tests.training.jobs import ROOT, metrics, run_job, write_config

SLURM = ROOT / "examples" / "slurm"
STEPS = "training.steps=2"
HASHES = ("step", "positions", "rollout_tokens")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def one_process(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of the run without a launcher."""
    return run_job(config, tmp_path_factory.mktemp("plain") / "run", STEPS)


def torchrun(config: Path, directory: Path) -> list[Finished]:
    """Two nodes of two ranks: two tensor-parallel groups, one on each."""
    job = (MAIN_JOB, "--config", config, f"run.directory={directory / 'run'}", STEPS)
    return run_nodes(2, 2, *job, "parallel.tensor=2", timeout=150)


def slurm(config: Path, directory: Path) -> list[Finished]:
    """Two nodes of one rank, by the script, with what it calls replaced: `srun` runs the command
    here once per node."""
    programs = stand_ins(
        directory / "bin",
        scontrol='[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"',
        srun="""
            while [[ $1 == --* ]]; do shift; done
            for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & done
            wait -n && wait -n""",
        torchrun=f'exec {sys.executable} -m torch.distributed.run "$@"',
    )
    script = SLURM / "multi_node.sbatch"
    job = (script, config, f"run.directory={directory / 'run'}", STEPS, "parallel.tensor=2")
    with reserved_port() as port:
        return run_programs(
            [("bash", *job)],
            timeout=150,
            PATH=f"{programs}:{os.environ['PATH']}",
            SLURM_JOB_ID=str(port),  # so that the script comes to this very port
            SLURM_JOB_NODELIST="node[1-2]",
            SLURM_JOB_NUM_NODES="2",
            SLURM_GPUS_ON_NODE="1",
            SLURM_CPUS_PER_TASK="1",
        )


def stand_ins(directory: Path, **programs: str) -> Path:
    """A directory with these programs, each by what bash is to run."""
    directory.mkdir()
    for name, text in programs.items():
        (directory / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / name).chmod(0o755)
    return directory


@pytest.mark.parametrize("launch", [torchrun, slurm])
def test_two_nodes_give_the_run_of_one_process(
    launch: Callable[[Path, Path], list[Finished]],
    config: Path,
    one_process: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    agents = launch(config, tmp_path)
    for agent in agents:
        assert agent.code == 0, agent.output
    # Rank 0 alone says what there is to know.
    logged = re.findall(r"(?m)\[rank (\d)\] INFO (.*)$", "".join(agent.output for agent in agents))
    assert {rank for rank, _ in logged} == {"0"}
    said = [text for _, text in logged]
    assert (
        len([t for t in said if re.fullmatch(r"\d+ windows of 64 tokens from 1 of 1 .*", t)]) == 1
    )
    assert said.count("chunk_delta_rule on cpu: torch") == 1
    for one, found in zip(one_process, metrics(tmp_path / "run"), strict=True):
        assert {key: found[key] for key in HASHES} == {key: one[key] for key in HASHES}
        for key in ("loss_ntp", "loss_policy", "reward_mean", "entropy_mean", "grad_norm", "lr"):
            assert found[key] == (None if one[key] is None else pytest.approx(one[key], abs=1e-5))


# Stands for torchrun and its ranks: they end well once they have got the signal.
AGENT = """
import signal, subprocess, sys

rank = "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, {wanted}); " + (
    "os.write(1, b'up '); os.write(1, b'%d ' % signal.sigwait({wanted}))"
)
command = [sys.executable, "-c", rank.replace("{wanted}", "{signal.SIGTERM, signal.SIGUSR1}")]
ranks = [subprocess.Popen(command) for _ in range(2)]
sys.exit(sum(rank.wait() for rank in ranks) + CODE)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("code", [0, 3])
def test_signals_reach_the_ranks_and_not_torchrun(sent: signal.Signals, code: int) -> None:
    agent = (sys.executable, "-c", AGENT.replace("CODE", str(code)))
    job = subprocess.Popen(
        ["bash", SLURM / "ranks_first.sh", *agent], stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    assert job.stdout.read(6) == "up up "
    job.send_signal(sent)
    output, _ = job.communicate(timeout=30)
    assert output.split() == [str(int(sent))] * 2
    assert job.returncode == code


@pytest.mark.slow
def test_job_that_slurm_signals_saves_and_ends_well(config: Path, tmp_path: Path) -> None:
    """Two ranks under torchrun under the script that Slurm starts; the second step sends SIGUSR1 to
    it, as Slurm does before the time limit."""
    program = tmp_path / "program.py"
    program.write_text(
        """
import os, runpy, signal, sys
import psutil

if __name__ == "__main__":
    from refine_mcore.training.step import TrainStep
    call = TrainStep.__call__

    def step(self, batches, number, mode=None):
        if number == 1 and os.environ["RANK"] == "0":
            os.kill(psutil.Process().parent().ppid(), signal.SIGUSR1)
        return call(self, batches, number, mode)

    TrainStep.__call__ = step
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
    )
    job = (program, MAIN_JOB, "--config", config, f"run.directory={tmp_path / 'run'}")
    script = ("bash", SLURM / "ranks_first.sh", *TORCHRUN, "--standalone", "--nproc-per-node", 2)
    [agent] = run_programs([(*script, *job, "training.steps=500")], timeout=150)
    assert agent.code == 0, agent.output
    done = len(metrics(tmp_path / "run"))
    assert done in (2, 3)  # a signal takes its time
    assert f"SIGUSR1: ended with {done} of 500 steps done and saved" in agent.output


SCRIPTS = pytest.mark.parametrize(
    "script", sorted(SLURM.glob("*.sbatch")), ids=lambda script: script.name
)


@SCRIPTS
@pytest.mark.parametrize("preempted", ["None", "2026-12-01T03:12"])
@pytest.mark.parametrize("code", [0, 3])
def test_preempted_job_is_queued_again(
    script: Path, preempted: str, code: int, tmp_path: Path
) -> None:
    """It has saved and ended before Slurm would do so. torchrun is started as a task, which alone
    gets the signals in time."""
    programs = stand_ins(
        tmp_path / "bin",
        scontrol=f"""case $* in
            "show hostnames nodes") echo head ;;
            "show job 7") echo "PreemptEligibleTime=2026-12-01T03:00 PreemptTime={preempted}"
                seq 9999 ;;
            *) echo "scontrol $*" ;;
        esac""",
        srun=f'echo "srun $*"; exit {code}',
    )
    [job] = run_programs(
        [("bash", script, "config.yaml", "training.steps=9")],
        timeout=30,
        PATH=f"{programs}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="nodes",
        SLURM_JOB_NUM_NODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_CPUS_PER_TASK="1",
    )
    task, *asked = job.output.splitlines()
    assert re.fullmatch(
        r"srun (--\S+ )*bash examples/slurm/ranks_first.sh torchrun .* --nproc-per-node 2 .*"
        r"pretrain_refine.py --config config.yaml training.steps=9",
        task,
    )
    assert asked == ([] if preempted == "None" else ["scontrol requeue 7"])
    assert job.code == code
    assert "#SBATCH --signal=USR1@" in script.read_text()  # to the tasks, not the script


@SCRIPTS
def test_slurm_scripts_are_sound(script: Path) -> None:
    for part in (script, *SLURM.glob("*.sh")):
        assert subprocess.run(["bash", "-n", part]).returncode == 0
    refused = subprocess.run(["bash", script], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "usage: sbatch" in refused.stderr
