"""A run goes on in the data that its checkpoint was trained on, or says that it does not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from refine_mcore.errors import UserError
from tests.training.jobs import CORPUS, ROOT, STEPS, column, metrics, run_job, write_config
from tests.training.test_checkpointing import EVERY_STEP, keep_until

ALLOWED = "checkpoint.allow_other_data=true"
LONGER = f"training.steps={STEPS + 1}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    run_job(config, run, EVERY_STEP)
    return run


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    with CORPUS.open(encoding="utf-8") as file:
        next(file)
        text = json.loads(next(file))["text"]
    path = tmp_path / "other.txt"
    path.write_text(text[:6000], encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("data.paths=[{other}]", "data.paths"),
        ("data.sequence_length=72", "data.sequence_length"),
        ("data.seed=5", "data.seed"),
        ("training.seed=5", "training.seed"),
        ("training.global_batch_size=8", "training.global_batch_size"),
    ],
)
@pytest.mark.parametrize("own", [True, False], ids=["its own", "loaded"])
def test_other_data_is_refused_unless_allowed(
    config, finished, tmp_path, other_text, caplog, option: str, name: str, own: bool
) -> None:
    """A run's own checkpoint as one that it loads; nothing is written before."""
    run = tmp_path / "run"
    options = [LONGER, option.format(other=other_text)]
    if own:
        shutil.copytree(finished, run)
    else:
        options.append(f"checkpoint.load={finished / 'checkpoints'}")
    with pytest.raises(UserError, match=f"was trained with another {name}: its 16 samples"):
        run_job(config, run, *options)
    assert run.exists() == own
    steps = run_job(config, run, *options, ALLOWED)
    assert column(steps, "step")[-1] == STEPS
    assert f"another {name}; going on from sample 16 of the present" in caplog.text
    # what is saved is of the present data
    run_job(config, run, *options[:2], f"training.steps={STEPS + 2}")


def test_files_may_move_but_not_change(config, finished, tmp_path) -> None:
    """Whatever their name; the tokenizer too. A longer file of the same head is another."""
    settings = yaml.safe_load(config.read_text())["data"]
    text, tokenizer = Path(settings["paths"][0]), Path(settings["tokenizer"])
    moved = tmp_path / "moved.txt", tmp_path / "moved.model"
    shutil.copy(text, moved[0])
    shutil.copy(tokenizer, moved[1])
    load = f"checkpoint.load={finished / 'checkpoints' / 'iter_0000003'}"
    options = (load, f"data.paths=[{moved[0]}]", f"data.tokenizer={moved[1]}")
    assert run_job(config, tmp_path / "run", *options) == metrics(finished)[3:]

    moved[0].write_text(text.read_text() + "\n")
    with pytest.raises(UserError, match=r"another data\.paths: "):
        run_job(config, tmp_path / "other", *options)
    moved[0].write_text(text.read_text())
    # an empty field of a number that the format does not use
    moved[1].write_bytes(tokenizer.read_bytes() + b"\xa2\x06\x00")
    with pytest.raises(UserError, match=r"another data\.tokenizer: "):
        run_job(config, tmp_path / "other", *options)


def test_checkpoints_that_do_not_say_their_data_go_on(config, finished, tmp_path, caplog) -> None:
    """Those made before it was kept."""
    run = shutil.copytree(finished, tmp_path / "run")
    keep_until(run, 3)
    common = run / "checkpoints" / "iter_0000003" / "common.pt"
    state = torch.load(common, weights_only=False)
    del state["progress"]["data"]
    torch.save(state, common)
    assert run_job(config, run) == metrics(finished)
    assert "does not say on which data it was trained" in caplog.text


def test_loading_a_run_that_has_ended(config, finished, tmp_path) -> None:
    """Nothing would be left to do: a sentence, and no directory."""
    load = f"checkpoint.load={finished / 'checkpoints'}"
    with pytest.raises(
        UserError,
        match=rf"^checkpoint.load {finished}/checkpoints/iter_0000004 has done 4 steps: nothing is "
        r"left to do of training.steps 4$",
    ):
        run_job(config, tmp_path / "run", load)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("length", "warned"), [(64, False), (1024, True)])
def test_many_epochs_are_said(config, tmp_path, caplog, length: int, warned: bool) -> None:
    """16 samples: of 26 windows, or of one."""
    caplog.set_level(logging.INFO, "refine_mcore")
    run_job(config, tmp_path / "run", f"data.sequence_length={length}")
    told = [r.getMessage() for r in caplog.records if "epochs of its data" in r.getMessage()]
    origin = "1 windows of 1024 tokens from 1 of 1 documents"
    expected = f"the run's 16 samples are 16 epochs of its data: {origin}"
    assert told == ([expected] if warned else [])


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/configs").glob("pretrain_*.yaml")))
def test_recipes_name_no_data(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Nothing is trained on by default."""
    run = tmp_path / "run"
    small = ("model.preset=null", f"model.checkpoint={finished / 'checkpoints'}")
    with pytest.raises(UserError, match=r"^data\.paths must name at least one file"):
        run_job(recipe, run, *small)
    with pytest.raises(UserError, match=r"^data\.tokenizer must name"):
        run_job(recipe, run, f"data.paths=[{CORPUS}]")  # no checkpoint that carries one
    assert not run.exists()
