"""Bad input to the programs: exit code 2 and one sentence on stderr, nothing left behind.

What the converter refuses is in tests/conversion/test_bad_input.py, single configuration values in
tests/test_config.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.pretrain_refine import main as pretrain
from refine_mcore.errors import cli
from tests.conversion.helpers import to_checkpoint
from tests.training.jobs import ROOT, run_job, write_config, write_letters
from tools.generate import _parse as parse_generation
from tools.generate import main as generate
from tools.score import main as score

Refused = Callable[..., str]
OF_ITS_CHECKPOINT = ("model.preset=null", "model.overrides={}")
NEEDED_KEY = "decoder.layers.0.self_attention.k_proj.weight"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that came from Hugging Face: weights and no optimizer."""
    return to_checkpoint(
        golden / "models" / "deltanet", tmp_path_factory.mktemp("converted") / "checkpoint"
    )


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one training step."""
    run = tmp_path_factory.mktemp("trained") / "run"
    run_job(config, run, "training.steps=1", "optimizer.lr_warmup_steps=0")
    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """`refused(main, *arguments)`: the sentence with which a program ends."""

    def run(main: Callable[[list[str]], None], *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli(main)
        printed = capfd.readouterr()
        assert exit_.value.code == 2
        assert printed.out == ""
        return the_sentence(printed.err)

    return run


def the_sentence(stderr: str) -> str:
    """All that was said but for the log, which must be one line."""
    stderr = re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?:INFO|WARNING) .*\n", "", stderr)
    assert stderr.startswith("error: ") and stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def refused_job(refused: Refused, config: Path, tmp_path: Path) -> Refused:
    """`refused_job(*overrides)`: the main job refuses and makes no checkpoint or metrics."""

    def run(*overrides: str) -> str:
        directory = tmp_path / "run"
        message = refused(pretrain, "--config", config, f"run.directory={directory}", *overrides)
        assert not (directory / "metrics.jsonl").exists()
        assert not (directory / "checkpoints").exists()
        return message

    return run


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["refine.rollout_token=5"], "unknown key refine.rollout_token, the nearest known one is"),
        (["training.steps=many"], "training.steps must be an integer, got 'many'"),
        (["refine.num_chunks=65"], "refine.num_chunks (65) exceeds data.sequence_length (64)"),
        (["data.sequence_length=39"], "is shorter than refine.margin_left + refine.margin_right"),
        (["refine.rollout_tokens=21"], "the fewest tokens that follow a position"),
        (["model.preset=tiny-delta"], "unknown model preset 'tiny-delta', known: bench-deltanet"),
        (["model.overrides.mixer.heads=3"], "model override 'mixer.heads': no such field"),
        (["model.overrides.mixer.num_heads=5"], "must be a positive whole number"),
        (["model.overrides.hidden_size=wide"], "hidden_size must be a whole number, got 'wide'"),
        (["model.overrides.vocab_size=50"], "has 2048 pieces, the model a vocabulary of 50"),
        (["data.paths=[]"], "data.paths must name at least one file"),
        (["data.tokenizer=null"], "data.tokenizer must name the model's tokenizer"),
        (["data.sequence_length=60000"], "no document is as long as data.sequence_length"),
        (["data.paths=[no.txt]"], "cannot read no.txt: No such file or directory"),
        (["data.tokenizer=no.model"], "tokenizer no.model does not exist"),
        (["parallel.tensor=2"], "1 rank(s) cannot be shared by model replicas"),
        (["parallel.tensor=3"], "parallel.tensor 3 does not divide the model's head count"),
        (["parallel.pipeline=2"], "1 rank(s) cannot be shared by model replicas"),
        (
            ["parallel.pipeline=3"],
            "parallel.pipeline 3 is more than the model's 2 layers: use at most 2",
        ),
        (["parallel.layers_per_stage=[1, 1]"], "names 2 stages, parallel.pipeline is 1"),
        (["parallel.layers_per_stage=[3]"], "adds up to 3 layers, the model has 2"),
        (["parallel.slices=999999"], "exceeds data.sequence_length"),
        (
            ["parallel.slices=2", "refine.mode=prefix_copy"],
            "prefix_copy, the reference, runs on whole texts",
        ),
        (["refine.rollout_fraction=0"], "rollout_fraction must be greater than 0 and at most 1"),
        (
            ["refine.rollout_fraction=0.3"],
            "each rank has 2 in an optimizer step, so it takes multiples of 1/2, such as 0.5",
        ),
        (
            ["refine.rollout_fraction=0.5", "refine.mode=two_phase", "refine.mini_batch_size=2"],
            "each rank has 1 in an optimizer step, so it takes multiples of 1/1, such as 1",
        ),
        (["optimizer.overlap_param_gather=true"], "needs optimizer.use_distributed_optimizer"),
        (["checkpoint.load=no/checkpoint"], "checkpoint no/checkpoint does not exist"),
        (["model.checkpoint=no/checkpoint"], "checkpoint no/checkpoint does not exist"),
        (["training.dtype=float64"], "training.dtype float64 needs optimizer.clip_grad 0"),
    ],
)
def test_settings(
    refused_job: Refused, tmp_path: Path, overrides: list[str], complaint: str
) -> None:
    assert complaint in refused_job(*overrides)
    assert not list(tmp_path.glob("run/*"))


def test_run_directories(refused: Refused, config: Path, tmp_path: Path, trained: Path) -> None:
    def start(directory: Path, *overrides: str) -> str:
        return refused(pretrain, "--config", config, f"run.directory={directory}", *overrides)

    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    assert "exists and is not a directory" in start(tmp_path / "file")
    assert "cannot be used: Not a directory" in start(tmp_path / "file" / "run")
    assert "cannot be used" in start(Path("/proc/run"))
    assert "/checkpoints: File name too long" in start(tmp_path / ("x" * 300))
    assert "holds something other than a run" in start(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    before = (trained / "config.yaml").read_text()
    assert "checkpoint.resume is never" in start(trained, "checkpoint.resume=never")
    assert (trained / "config.yaml").read_text() == before


def test_configuration_files(refused: Refused, tmp_path: Path) -> None:
    broken = tmp_path / "config.yaml"
    broken.write_text("model: [")
    assert "not valid YAML at line 1" in refused(pretrain, "--config", broken)
    missing = tmp_path / "no.yaml"
    assert refused(pretrain, "--config", missing) == (
        f"cannot read the configuration {missing}: No such file or directory"
    )


def spoiled(checkpoint: Path, target: Path, spoil: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint with `spoil` applied to its directory."""
    shutil.copytree(checkpoint, target)
    spoil(target)
    return target


def truncate(directory: Path) -> None:
    """Cut the last kilobyte off every data file."""
    for file in directory.glob("*.distcp"):
        os.truncate(file, max(0, file.stat().st_size - 1000))


def empty_metadata(directory: Path) -> None:
    (directory / ".metadata").write_bytes(b"")


def another_size(directory: Path) -> None:
    """Claim a wider MLP than there are weights for."""
    path = directory / "architecture.json"
    path.write_text(path.read_text().replace('"intermediate_size": 24', '"intermediate_size": 26'))


def another_depth(directory: Path) -> None:
    """Claim a layer more than there are weights for."""
    path = directory / "architecture.json"
    path.write_text(path.read_text().replace('"num_layers": 3', '"num_layers": 4'))


def no_description(directory: Path) -> None:
    (directory / "architecture.json").unlink()


def no_data(directory: Path) -> None:
    for file in directory.glob("*.distcp"):
        file.unlink()


SPOILED_CHECKPOINTS = [
    (truncate, "damaged"),
    (no_data, "damaged"),
    (empty_metadata, ".metadata is damaged"),
    (another_size, "of shape [48, 64], the model needs [52, 64]"),
    (another_depth, "lacks the tensor decoder.layers.3."),
    (no_description, "does not say what model it holds"),
]


@pytest.mark.parametrize(("spoil", "complaint"), SPOILED_CHECKPOINTS)
def test_spoiled_checkpoints(
    refused_job: Refused,
    refused: Refused,
    golden: Path,
    converted: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    complaint: str,
) -> None:
    checkpoint = spoiled(converted, tmp_path / "spoiled", spoil)
    overrides = (f"model.checkpoint={checkpoint}", *write_letters(tmp_path))
    message = refused_job(*overrides, *OF_ITS_CHECKPOINT)
    assert complaint in message and str(checkpoint) in message

    tokens = golden / "models" / "deltanet" / "inputs.safetensors"
    output = tmp_path / "scores.safetensors"
    arguments = ("--checkpoint", checkpoint, "--tokens", tokens, "--key", "input_ids_a")
    assert refused(score, *arguments, "--output", output) == message
    assert not list(tmp_path.glob("*scores*"))


def test_checkpoints_of_another_kind(
    refused_job: Refused, converted: Path, trained: Path, tmp_path: Path
) -> None:
    """`checkpoint.load` wants a training checkpoint, of the model that is being trained."""
    checkpoint = trained / "checkpoints"
    other_model = "holds another model than the run asks for: num_layers"
    assert other_model in refused_job(
        f"checkpoint.load={checkpoint}", "model.overrides.num_layers=3"
    )
    start = (f"model.checkpoint={checkpoint}", "model.preset=null")
    wider, deeper = "model.overrides={hidden_size: 64}", "model.overrides={num_layers: 3}"
    assert "of shape [32], the model needs [64]" in refused_job(*start, wider)
    assert "lacks the tensor decoder.layers.2." in refused_job(*start, deeper)
    shallower = refused_job(*start, "model.overrides={num_layers: 1}")
    assert "such as decoder.layers.1." in shallower
    assert "that the model has no place for" in shallower
    of_run = refused_job(f"model.checkpoint={trained}", "model.preset=null")
    assert of_run.endswith(f"is the directory of a run: its checkpoints are in {checkpoint}")
    weights_only = f"{converted} holds weights only"
    letters = write_letters(tmp_path)
    allowed = "checkpoint.allow_other_data=true"
    assert "holds another model than the run asks for" in refused_job(
        f"checkpoint.load={checkpoint}",
        f"model.checkpoint={converted}",
        *letters,
        allowed,
        *OF_ITS_CHECKPOINT,
    )
    assert weights_only in refused_job(
        f"checkpoint.load={converted}",
        f"model.checkpoint={converted}",
        *letters,
        *OF_ITS_CHECKPOINT,
    )
    for other in ("training.dtype=bfloat16", "optimizer.use_distributed_optimizer=true"):
        assert "holds the state of another optimizer" in refused_job(
            f"checkpoint.load={checkpoint}", other
        )
    damaged = spoiled(checkpoint / "iter_0000001", tmp_path / "damaged", truncate)
    assert f"{damaged} is damaged" in refused_job(f"checkpoint.load={damaged}")
    damaged = spoiled(
        checkpoint / "iter_0000001", tmp_path / "no_common", lambda d: (d / "common.pt").unlink()
    )
    assert f"{damaged} is damaged" in refused_job(f"checkpoint.load={damaged}")
    assert "is not the architecture of model.checkpoint" in refused_job(
        f"model.checkpoint={converted}"
    )


@pytest.fixture
def refused_score(refused: Refused, converted: Path, golden: Path, tmp_path: Path) -> Refused:
    """`refused_score(option=value)`: score.py refuses and leaves no file."""

    def run(*overrides: str, **options: object) -> str:
        chosen = {
            "checkpoint": converted,
            "tokens": golden / "models" / "deltanet" / "inputs.safetensors",
            "key": "input_ids_a",
            "output": tmp_path / "scores.safetensors",
        } | options
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
        before = sorted(tmp_path.rglob("*"))
        message = refused(score, *arguments, *overrides)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


def test_score_arguments(refused_score: Refused, tmp_path: Path) -> None:
    (tmp_path / "exists").write_text("x")
    assert "exists exists" in refused_score(output=tmp_path / "exists")
    assert "exists is no directory" in refused_score(output=tmp_path / "exists" / "x")
    assert "no is no directory" in refused_score(output=tmp_path / "no" / "x")
    assert "cannot write /proc/x" in refused_score(output="/proc/x")
    assert "has no tensor 'ids', only input_ids_a, input_ids_b" in refused_score(key="ids")
    for position in ("0", "-3", "84", "14,200"):
        assert "is outside the text" in refused_score(rollout_at=position)
    assert "must be whole numbers" in refused_score(rollout_at="14,x")
    assert "--greedy is of rollouts" in refused_score("--greedy")
    for count in ("0", "-1"):
        assert "--rollout-tokens must be at least 1" in refused_score(
            rollout_at="14", rollout_tokens=count
        )
    assert "training.dtyp, the nearest known one is training.dtype" in refused_score(
        "training.dtyp=float32"
    )
    for ignored in ("parallel.slices=2", "training.recompute=full"):
        assert "score.py reads whole texts" in refused_score(ignored)


def test_score_tokens(refused_score: Refused, tmp_path: Path) -> None:
    """More of them in tests/data/test_token_file.py."""
    file = tmp_path / "tokens.safetensors"
    save_file({"float": torch.ones(2, 20), "large": torch.full((2, 20), 97)}, file)
    assert f"float in {file} must hold whole numbers" in refused_score(tokens=file, key="float")
    assert f"large in {file}: token id 97 is outside the model's vocabulary of 97" in (
        refused_score(tokens=file, key="large")
    )
    os.truncate(file, file.stat().st_size - 8)
    assert f"{file} is not a readable safetensors file" in refused_score(tokens=file)
    missing = tmp_path / "no.safetensors"
    assert refused_score(tokens=missing) == f"{missing} does not exist"


def test_generate_says_what_it_cannot_do(refused: Refused, tmp_path: Path) -> None:
    options = ("--checkpoint", tmp_path, "--prompt", "a")
    assert "--stop names an empty text" in refused(generate, *options, "--stop", "b", "")
    assert refused(generate, *options, "--max-new-tokens", 0) == (
        "--max-new-tokens must be at least 1, not 0"
    )
    assert "--prompt is not text in UTF-8" in refused(generate, *options[:3], "\udcff")


def test_each_stop_counts() -> None:
    options = ["--checkpoint", "c", "--prompt", "a", "--stop", "b", "c", "--stop", "d"]
    assert parse_generation(options).stop == ["b", "c", "d"]
    assert parse_generation(options[:4]).stop == []


def run_program(*command: object) -> tuple[int, str]:
    """A program's exit code and stderr, with nothing but its defaults in the environment."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stderr


def test_score_says_one_sentence(converted: Path, golden: Path, tmp_path: Path) -> None:
    """As a process of its own, after everything has been imported and the model begun to load."""
    checkpoint = spoiled(converted, tmp_path / "spoiled", truncate)
    tokens = golden / "models" / "deltanet" / "inputs.safetensors"
    options = ("--tokens", tokens, "--key", "input_ids_a", "--output", tmp_path / "out")
    code, stderr = run_program(ROOT / "tools/score.py", "--checkpoint", checkpoint, *options)
    assert code == 2
    assert "damaged" in the_sentence(stderr)


@pytest.mark.alone
def test_all_ranks_say_one_sentence(config: Path, tmp_path: Path) -> None:
    """Under torchrun, which adds its own report of failed ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    job = (ROOT / "examples/pretrain_refine.py", "--config", config)
    (tmp_path / "file").write_text("x")
    code, stderr = run_program(*launcher, *job, f"run.directory={tmp_path / 'file' / 'run'}")
    assert code != 0
    assert stderr.count("error: ") == 1
    assert f"error: run.directory {tmp_path}/file/run cannot be used: Not a directory\n" in stderr
    assert "Warning" not in stderr and "megatron" not in stderr
    assert stderr.count("Traceback") <= 1  # torchrun's own
