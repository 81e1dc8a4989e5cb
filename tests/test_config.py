"""Configuration: settings arrive typed, and every mistake is one sentence naming file and key."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refine_mcore.config import (
    TOKENS,
    Config,
    ModelConfig,
    config_from_dict,
    data_parallel_layout,
    load_config,
    prepare_run_directory,
    save_config,
    to_dict,
)
from refine_mcore.conversion.description import write_description
from refine_mcore.errors import UserError
from refine_mcore.models.presets import preset
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.training.setup import resolve_architecture, tape_interval

MINIMAL = "model: {preset: tiny-deltanet}\n"
EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/configs/*.yaml"))


@pytest.fixture
def write(tmp_path: Path):
    """A function that writes a configuration file and returns its path."""

    def write_file(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_published_mid_training_values(write):
    config = load_config(write(MINIMAL))
    refine = config.refine
    assert (refine.num_chunks, refine.rollout_tokens, refine.rollouts_per_position) == (8, 5, 1)
    assert (refine.ntp_weight, refine.policy_weight) == (1.0, 0.2)
    assert (refine.clip_low, refine.clip_high, refine.dual_clip) == (0.2, 0.2, 3.0)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-6, 0.01)
    assert (config.data.sequence_length, config.training.global_batch_size) == (16384, 128)


def test_file_then_overrides_in_order(write):
    path = write(MINIMAL + "refine: {num_chunks: 4, reward: binary}\ntraining:\n")
    config = load_config(path, ["refine.num_chunks=2", "refine.num_chunks=3", "optimizer.lr=1e-3"])
    assert config.refine.num_chunks == 3
    assert config.refine.reward == "binary"
    assert config.optimizer.lr == 1e-3


def test_values_arrive_with_their_type(write):
    config = load_config(
        write(MINIMAL + "optimizer: {lr: 1e-3, clip_grad: 1}\nrefine: {reward_weights: [1, 5e-1]}"),
        ["refine.smoothing_window=null", "data.paths=[a.txt, b.jsonl]", "run.directory=2024"],
    )
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (0.001, 1.0)
    assert isinstance(config.optimizer.clip_grad, float)
    assert config.refine.reward_weights == (1.0, 0.5)
    assert config.refine.smoothing_window is None
    assert config.data.paths == ("a.txt", "b.jsonl")
    assert config.run.directory == "2024"


@pytest.mark.parametrize("text", ["[unclosed", "a: b", "'quoted", "*star", "~x"])
def test_a_string_override_is_taken_as_typed(write, text):
    assert load_config(write(MINIMAL), [f"run.directory={text}"]).run.directory == text


def test_string_overrides_may_be_null_or_quoted(write):
    overrides = ["model.checkpoint=null", "checkpoint.load=7", "run.directory='12'"]
    config = load_config(write(MINIMAL), overrides)
    assert config.model.checkpoint is None
    assert config.checkpoint.load == "7"
    assert config.run.directory == "12"


def test_model_overrides_are_dotted_however_they_are_written(write):
    nested = MINIMAL.replace("}", ", overrides: {hidden_size: 64, mixer: {num_heads: 2}}}")
    expected = {"hidden_size": 64, "mixer.num_heads": 2}
    assert load_config(write(nested)).model.overrides == expected
    overrides = ["model.overrides.hidden_size=64", "model.overrides.mixer.num_heads=2"]
    assert load_config(write(MINIMAL), overrides).model.overrides == expected


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("refine.num_chunk", "refine.num_chunks"),
        ("refin.num_chunks", "refine.num_chunks"),
        ("training.microbatch_size", "training.micro_batch_size"),
        ("optimiser.lr", "optimizer.lr"),
        ("num_chunks", "refine.num_chunks"),
    ],
)
def test_unknown_key_names_the_nearest(write, key, nearest):
    message = refusal(write(MINIMAL), f"{key}=1")
    assert f"unknown key {key}, the nearest known one is {nearest}" in message
    section, _, name = key.partition(".")
    if name and section in {f.name for f in fields(Config)}:
        path = write(MINIMAL + f"{section}: {{{name}: 1}}\n")
        assert refusal(path).startswith(f"{path}: unknown key {key}, the nearest")


def test_unknown_section_and_misplaced_entry(write):
    path = write(MINIMAL + "optimiser: {lr: 1.0}\n")
    assert refusal(path) == f"{path}: unknown key optimiser, the nearest known one is optimizer"
    assert "unknown key refine.reward.kind" in refusal(write(MINIMAL), "refine.reward.kind=1")
    assert "unknown key __class__.__name__" in refusal(write(MINIMAL), "__class__.__name__=1")


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("refine.num_chunks", "4.0", "must be an integer, got 4.0"),
        ("refine.num_chunks", "true", "must be an integer, got true"),
        ("refine.num_chunks", "four", "must be an integer, got 'four'"),
        ("refine.num_chunks", "null", "must be an integer, got nothing (null)"),
        ("refine.num_chunks", "[4]", "must be an integer, got a list"),
        ("refine.num_chunks", "0", "must be at least 1, got 0"),
        ("refine.normalize_std", "1", "must be true or false, got 1"),
        ("optimizer.lr", "fast", "must be a number, got 'fast'"),
        ("optimizer.lr", "true", "must be a number, got true"),
        ("optimizer.lr", ".nan", "must be a number, got nan"),
        ("optimizer.lr", "inf", "must be a number, got 'inf'"),
        ("optimizer.lr", "1" + "0" * 400, "must be a number"),
        ("optimizer.lr", "-1e-3", "must be greater than 0, got -0.001"),
        ("optimizer.beta1", "1.0", "must be at least 0 and below 1, got 1.0"),
        ("refine.dual_clip", "1.0", "must be greater than 1, got 1.0"),
        ("refine.policy_weight", "-0.1", "must be at least 0, got -0.1"),
        ("refine.mode", "turbo", "must be one of ntp, fused, two_phase, prefix_copy, got 'turbo'"),
        ("training.recompute", "half", "must be one of selective, full, got 'half'"),
        ("refine.reward_weights", "[1]", "must be a list of 2 values, got 1"),
        ("data.paths", "a.txt", "must be a list, got 'a.txt'"),
        ("model.overrides", "3", "must be a mapping, got 3"),
    ],
)
def test_wrong_values(write, key, value, complaint):
    in_file = write(MINIMAL + f"{key.partition('.')[0]}: {{{key.partition('.')[2]}: {value}}}\n")
    if not key.startswith("model."):  # MINIMAL has that section already
        assert refusal(in_file).startswith(f"{in_file}: {key} {complaint}")
    message = refusal(write(MINIMAL), f"{key}={value}")
    assert message.startswith("override ") and f"{key} {complaint}" in message


def test_wrong_item_and_wrong_string_in_a_file(write):
    path = write(MINIMAL + "data: {paths: [a.txt, 3]}\n")
    assert refusal(path) == f"{path}: data.paths[1] must be a string, got 3"
    path = write(MINIMAL + "run: {directory: 3}\n")
    assert refusal(path) == f"{path}: run.directory must be a string, got 3"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n- b\n", "must hold a mapping of sections, got a list"),
        ("just words", "must hold a mapping of sections, got 'just words'"),
        ("refine: 3", "refine must be a section with keys, got 3"),
        ("refine: {num_chunks: 4\n", "not valid YAML at line 2"),
        ("model: {preset: a}\nmodel: {preset: b}\n", "key 'model' given twice"),
        ("model: {preset: a, preset: b}\n", "not valid YAML at line 1: key 'preset' given twice"),
        ("model: !!python/object:os.system {}\n", "not valid YAML at line 1"),
        ("model: \0\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", "not valid YAML at line 1"),
        ("3: {a: 1}\n", "unknown key 3"),
        ("", "model.preset or model.checkpoint must be given"),
    ],
)
def test_malformed_files(write, text, complaint):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and complaint in message


def test_unreadable_files(tmp_path, write):
    assert refusal(tmp_path / "no.yaml") == (
        f"cannot read the configuration {tmp_path / 'no.yaml'}: No such file or directory"
    )
    assert "Is a directory" in refusal(tmp_path)
    path = write("")
    path.write_bytes(b"model: \xff\n")
    assert refusal(path) == f"{path}: not valid YAML: the file is not UTF-8 text"


def test_malformed_overrides(write):
    path = write(MINIMAL)
    assert "must have the form section.key=value" in refusal(path, "refine.num_chunks")
    assert "not valid YAML" in refusal(path, "refine.num_chunks=[1")


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["refine.rollout_tokens=21"], ["refine.rollout_tokens (21)", "refine.margin_right (20)"]),
        (
            ["refine.reward=future", "refine.future_tokens=16"],
            ["refine.future_tokens (5 + 16)", "refine.margin_right (20)"],
        ),
        (
            ["data.sequence_length=64", "refine.num_chunks=65"],
            ["refine.num_chunks (65)", "data.sequence_length (64)"],
        ),
        (["data.sequence_length=39"], ["data.sequence_length (39)", "refine.margin_left"]),
        (
            ["training.micro_batch_size=3"],
            ["training.global_batch_size (128)", "training.micro_batch_size (3)"],
        ),
        (
            ["refine.mode=two_phase", "refine.mini_batch_size=48"],
            ["training.global_batch_size (128)", "refine.mini_batch_size (48)"],
        ),
        (
            ["refine.mode=two_phase", "refine.mini_batch_size=2", "training.micro_batch_size=4"],
            ["refine.mini_batch_size (2)", "training.micro_batch_size (4)"],
        ),
        (["training.ntp_warmup_steps=101"], ["training.ntp_warmup_steps (101)", "training.steps"]),
        (
            ["training.recompute=full", "parallel.slices=1"],
            ["training.recompute", "parallel.slices 1"],
        ),
        (["optimizer.min_lr=1"], ["optimizer.min_lr (1.0)", "optimizer.lr (1e-06)"]),
        (["optimizer.lr_warmup_steps=100"], ["lr_warmup_steps (100)", "training.steps (100)"]),
        (
            ["optimizer.lr_warmup_steps=9", "optimizer.lr_decay_steps=9"],
            ["lr_warmup_steps (9)", "optimizer.lr_decay_steps (9)"],
        ),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "parallel.tensor"]),
        (["checkpoint.keep_every=10"], ["checkpoint.keep_every", "checkpoint.keep_last"]),
    ],
)
def test_impossible_combinations(write, overrides, keys):
    path = write(MINIMAL)
    message = refusal(path, *overrides)
    assert message.startswith(f"{path}: ")
    for key in keys:
        assert key in message


def test_limits_themselves_are_allowed(write):
    overrides = ["refine.rollout_tokens=20", "data.sequence_length=40", "refine.num_chunks=40"]
    assert load_config(write(MINIMAL), overrides).refine.rollout_tokens == 20
    # Next-token training draws no positions: their limits do not concern it.
    load_config(write(MINIMAL), ["refine.mode=ntp", "data.sequence_length=16"])


def test_layout():
    config = config_from_dict({"model": {"preset": "tiny-deltanet"}}, "test")
    config = replace(config, parallel=replace(config.parallel, tensor=2, pipeline=2))
    assert data_parallel_layout(config, 16) == (4, 32)
    with pytest.raises(
        UserError, match="6 rank.s. cannot be shared .* 2 x 2: start a multiple of 4 ranks"
    ):
        data_parallel_layout(config, 6)
    with pytest.raises(UserError, match=r"training.global_batch_size \(128\) must be .*1 x 3"):
        data_parallel_layout(config, 12)
    two_phase = replace(config.refine, mode="two_phase", mini_batch_size=4)
    with pytest.raises(UserError, match=r"refine.mini_batch_size \(4\) must be .*1 x 8"):
        data_parallel_layout(replace(config, refine=two_phase), 32)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_configs_load(path):
    config = load_config(path)
    if path.name.startswith("pretrain"):
        assert (config.refine.mode, config.refine.mini_batch_size) == ("two_phase", 32)
    if path.name.startswith("bench"):
        assert config.data.sequence_length == 4096


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_configs_can_start(path):
    config = load_config(path)
    architecture = resolve_architecture(config)
    transformer_config(architecture, tape_interval=tape_interval(config))


def test_a_preset_is_the_checkpoints_with_the_overrides_on_both(tmp_path):
    """As of one that a run with these overrides has written, or one before; none other."""
    muon, small = {"mixer.muon_dtype": "bfloat16"}, {"num_layers": 1}
    stored = preset("tiny-lact")
    for written, overrides, fits in (
        ({}, {}, True),
        ({}, muon, True),
        (muon, muon, True),
        (muon, {}, False),
        (small, muon, False),
    ):
        directory = tmp_path / "checkpoint"
        directory.mkdir(exist_ok=True)
        write_description(directory, stored.with_overrides(written))
        model = ModelConfig(preset="tiny-lact", checkpoint=str(directory), overrides=overrides)
        config = replace(
            config_from_dict({"model": {"preset": "tiny-lact"}}, "a test"), model=model
        )
        if fits:
            assert resolve_architecture(config) == stored.with_overrides(overrides)
        else:
            with pytest.raises(UserError, match="is not the architecture of"):
                resolve_architecture(config)


def test_examples_exist():
    assert len(EXAMPLES) == 14


@given(
    chunks=st.integers(1, 64),
    lr=st.floats(1e-12, 1e3),
    paths=st.lists(st.text(min_size=1), min_size=1),
    directory=st.text(min_size=1),
    window=st.none() | st.integers(1, 9),
)
def test_saved_configuration_loads_equal(tmp_path_factory, chunks, lr, paths, directory, window):
    config = config_from_dict(
        {
            "model": {"preset": "tiny-deltanet", "overrides": {"mixer.num_heads": 2}},
            "data": {"paths": paths},
            "refine": {"num_chunks": chunks, "smoothing_window": window},
            "optimizer": {"lr": lr},
            "run": {"directory": directory},
        },
        "test",
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config == config_from_dict(to_dict(config), "test")
    assert os.listdir(path.parent) == ["config.yaml"]


def test_saving_where_it_cannot_be_written(tmp_path, write):
    config = load_config(write(MINIMAL))
    with pytest.raises(UserError, match="cannot write .*absent/config.yaml: No such file"):
        save_config(config, tmp_path / "absent" / "config.yaml")


def run_in(directory: Path, resume: str = "auto") -> Config:
    data = {
        "model": {"preset": "tiny-deltanet"},
        "run": {"directory": str(directory)},
        "checkpoint": {"resume": resume},
    }
    return config_from_dict(data, "test")


def test_run_directory_is_made_or_taken_over(tmp_path):
    run = prepare_run_directory(run_in(tmp_path / "a" / "run", "never"))
    prepare_run_directory(run_in(run, "never"))  # a run that never began leaves nothing
    save_config(run_in(run), run / "config.yaml")
    prepare_run_directory(run_in(run))
    (tmp_path / "empty").mkdir()
    prepare_run_directory(run_in(tmp_path / "empty", "never"))
    # One that was refused, or died, after its documents had been read leaves no more than these.
    for name in ("tokens-0a", ".tokens-0a.partial"):
        (tmp_path / "begun" / TOKENS / name).mkdir(parents=True)
    prepare_run_directory(run_in(tmp_path / "begun", "never"))


def test_run_directory_that_exists_is_refused(tmp_path):
    run = prepare_run_directory(run_in(tmp_path / "run"))
    save_config(run_in(run), run / "config.yaml")
    with pytest.raises(UserError, match="exists and checkpoint.resume is never"):
        prepare_run_directory(run_in(run, "never"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and holds something other than a run"):
        prepare_run_directory(run_in(tmp_path / "other"))
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]
    (tmp_path / "texts" / TOKENS / "tokens-0a").mkdir(parents=True)
    (tmp_path / "texts" / TOKENS / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and holds something other than a run"):
        prepare_run_directory(run_in(tmp_path / "texts"))


def test_run_directory_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists and is not a directory"):
        prepare_run_directory(run_in(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be used: Not a directory"):
        prepare_run_directory(run_in(tmp_path / "file" / "run"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="is not writable"):
        prepare_run_directory(run_in(tmp_path / "run"))
