"""Every setting takes effect: the main job is run without it and with it, and what it does is seen
in what the job builds, computes, prints or writes.

`TABLE` has an entry, or several, for every field of the schema. An entry says a value that is not
the default, and what of an `Observed` run shows it; a field that the job ignored would show the
same in both runs.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml

from refine_mcore.config import Config, load_config
from tests.observed_run import Built, Observed, observe
from tests.training.jobs import CORPUS, TIMES, TOKENIZER

# What an entry expects to see: the value that was set; or anything but what is seen without it.
THE_VALUE, ANOTHER = object(), object()


@dataclass(frozen=True)
class Seen:
    """One way in which a setting of `value` (YAML) shows.

    `given` are other settings, of both runs. Entries of one `joint` are set together in one run,
    in which each shows its own value. With several `ranks` the job is only built; with `saves` it
    writes its checkpoints.
    """

    value: str
    of: Callable[[Observed], Any]
    expected: Any = THE_VALUE
    given: tuple[str, ...] = ()
    joint: str | None = None
    ranks: int = 1
    saves: bool = False


def built(seen: Observed) -> Built:
    assert seen.built is not None, seen.refused
    return seen.built


def optimizer(value: str, name: str) -> Seen:
    """In the configuration of Megatron's optimizer."""
    return Seen(value, lambda seen: built(seen).optimizer[name], joint="optimizer")


def adam(value: str, name: str, index: int | None = None) -> Seen:
    """In torch's Adam: the one value of all groups of parameters but those without decay."""

    def option(seen: Observed) -> Any:
        groups = built(seen).adam
        values = {group[name] if index is None else group[name][index] for group in groups}
        (value,) = values - {0.0}
        return value

    return Seen(value, option, joint="optimizer")


def schedule(value: str, name: str) -> Seen:
    """In Megatron's schedule of the learning rate."""
    return Seen(value, lambda seen: built(seen).schedule[name], joint="optimizer")


def reduction(name: str) -> Seen:
    """In the configuration of Megatron's data parallelism."""
    return Seen("true", lambda seen: built(seen).data_parallel[name], joint="optimizer")


def layout(value: str, of: Callable[[Built], Any], expected: Any = THE_VALUE) -> Seen:
    """In what the first of four ranks builds."""
    depth = ("model.overrides.num_layers=3", "training.global_batch_size=4")
    return Seen(value, lambda seen: of(built(seen)), expected, depth, joint="layout", ranks=4)


def changed(value: str, metric: str, *given: str) -> Seen:
    """In a metric of the steps, which is another one."""
    return Seen(value, lambda seen: seen.column(metric), ANOTHER, given)


def first_texts(seen: Observed) -> list[Any]:
    return [batch.tokens.tolist() for batch in seen.batches[0]]


def texts_per_pass(seen: Observed) -> int:
    return max(len(batch.tokens) for batch in seen.batches[0])


def texts_per_step(seen: Observed) -> int:
    return sum(len(batch.tokens) for batch in seen.batches[0])


def weights_drawn(seen: Observed) -> float:
    return built(seen).weights.double().sum().item()


# Two optimizer steps on the rollouts of one batch, far enough apart for ratios far from 1.
OFF_POLICY = ("refine.mode=two_phase", "refine.mini_batch_size=1", "optimizer.lr=3e-2")
WIDE = ("refine.margin_left=1", "refine.margin_right=4")
STEPS = ("training.steps=3",)
EVERY_STEP = (*STEPS, "checkpoint.save_interval=1")
# A preset without overrides, as the checkpoint has it.
DEMO = ("model.preset=demo-deltanet", "model.overrides={}")

HELD_OUT = f"evaluation.paths=[{CORPUS}]"
# Of other jobs than mid-training, and needles, which take long and score zero.
ELSEWHERE = {
    "data.answer_eos": "tests/data/test_examples.py",
    "data.max_answer_tokens": "tests/data/test_examples.py",
    "training.decode_graphs": "tests/pipeline/test_decode_passes.py",
    "posttrain.inner": "tests/training/test_posttrain.py",
    "ttt.reset": "tests/evaluation/test_ttt.py",
    "evaluation.niah_length": "tests/evaluation/test_in_training.py",
    "evaluation.niah_rows": "tests/evaluation/test_tasks.py",
}


def evaluated(seen: Observed) -> set[str]:
    """What an evaluation has written, if there was one."""
    return {"evaluation/loss"}.intersection(*(seen.metrics or [{}]))


TABLE: list[tuple[str, Seen]] = [
    (
        "model.preset",
        Seen("tiny-lact", lambda s: built(s).model["architecture"].mixer.family, "lact"),
    ),
    ("model.checkpoint", Seen("$checkpoint", weights_drawn, ANOTHER, DEMO)),
    (
        "model.overrides",
        Seen("{vocab_size: 2048, hidden_size: 48}", lambda s: built(s).model["hidden_size"], 48),
    ),
    # Refused where there is no Transformer Engine.
    (
        "model.transformer_engine",
        Seen("true", lambda s: s.refused or built(s).linear, ANOTHER),
    ),
    (
        "model.fast_weight_matmul",
        Seen(
            "bfloat16",
            lambda s: built(s).model.get("fast_weight_matmul"),
            given=("model.preset=tiny-lact",),
        ),
    ),
    ("data.paths", Seen("[$text]", first_texts, ANOTHER)),
    ("data.tokenizer", Seen("$tokenizer", first_texts, ANOTHER)),
    (
        "data.unused_vocabulary",
        Seen(
            "0",
            lambda s: "data.unused_vocabulary allows 0" in s.refused,
            True,
            ("model.overrides.vocab_size=2050",),
        ),
    ),
    ("data.sequence_length", Seen("72", lambda s: s.batches[0][0].tokens.shape[1])),
    ("data.packing", Seen("documents", lambda s: s.batches[0][0].documents, ANOTHER)),
    ("data.cache", Seen("$cache", lambda s: "data" in s.files, False)),
    ("data.seed", Seen("5", first_texts, ANOTHER)),
    ("refine.mode", Seen("ntp", lambda s: s.column("reward_mean"), [None])),
    ("refine.mode", Seen("prefix_copy", lambda s: len(s.passes), ANOTHER)),
    ("refine.num_chunks", changed("2", "positions")),
    ("refine.rollout_tokens", changed("3", "rollout_tokens")),
    ("refine.rollout_entropy", changed("10", "rollout_length")),
    ("refine.rollouts_per_position", changed("2", "rollout_tokens")),
    ("refine.selection", changed("argmax", "positions")),
    ("refine.entropy_of", changed("prefix_token", "positions", "refine.selection=argmax")),
    ("refine.selection_temperature", changed("1e-4", "positions")),
    ("refine.smoothing_window", changed("21", "positions", *WIDE)),
    (
        "refine.pooling_ignores_padding",
        changed("true", "positions", *WIDE, "refine.smoothing_window=21"),
    ),
    ("refine.margin_left", changed("40", "positions")),
    ("refine.margin_right", changed("40", "positions")),
    ("refine.rollout_temperature", changed("0.1", "rollout_tokens")),
    ("refine.reward", changed("edit", "reward_mean")),
    ("refine.future_tokens", changed("3", "reward_mean", "refine.reward=future")),
    ("refine.reward_weights", changed("[0.5, 1]", "reward_mean", "refine.reward=hybrid")),
    ("refine.grouping", changed("joint", "grad_norm", "refine.rollouts_per_position=2")),
    ("refine.normalize_std", changed("false", "grad_norm")),
    ("refine.advantage_eps", changed("1", "grad_norm")),
    ("refine.clip_low", changed("0.01", "loss_policy", *OFF_POLICY)),
    ("refine.clip_high", changed("0.01", "loss_policy", *OFF_POLICY)),
    ("refine.dual_clip", changed("1.01", "loss_policy", *OFF_POLICY)),
    ("refine.aggregation", changed("seq-mean-token-sum", "grad_norm")),
    ("refine.ntp_weight", changed("0.5", "grad_norm")),
    ("refine.policy_weight", changed("0.5", "grad_norm")),
    (
        "refine.rollout_fraction",
        Seen("0.5", lambda s: len(s.passes), ANOTHER),
    ),
    ("refine.mini_batch_size", changed("1", "loss_policy", "refine.mode=two_phase")),
    ("evaluation.every", Seen("1", evaluated, {"evaluation/loss"}, (HELD_OUT,))),
    ("evaluation.paths", changed("[$text]", "evaluation/loss", "evaluation.every=1", HELD_OUT)),
    ("evaluation.texts", changed("1", "evaluation/loss", "evaluation.every=1", HELD_OUT)),
    ("evaluation.text_length", changed("40", "evaluation/loss", "evaluation.every=1", HELD_OUT)),
    ("optimizer.lr", optimizer("0.5", "lr")),
    ("optimizer.lr", schedule("0.5", "max_lr")),
    ("optimizer.beta1", adam("0.8", "betas", 0)),
    ("optimizer.beta2", adam("0.7", "betas", 1)),
    ("optimizer.eps", adam("0.25", "eps")),
    ("optimizer.weight_decay", adam("0.125", "weight_decay")),
    ("optimizer.weight_decay", optimizer("0.125", "weight_decay")),
    ("optimizer.weight_decay", schedule("0.125", "start_wd")),
    ("optimizer.weight_decay", schedule("0.125", "end_wd")),
    ("optimizer.clip_grad", optimizer("0.5", "clip_grad")),
    ("optimizer.lr_warmup_steps", schedule("3", "lr_warmup_steps")),
    ("optimizer.lr_decay_style", schedule("linear", "lr_decay_style")),
    ("optimizer.lr_decay_steps", schedule("7", "lr_decay_steps")),
    ("optimizer.min_lr", optimizer("1.0e-5", "min_lr")),
    ("optimizer.min_lr", schedule("1.0e-5", "min_lr")),
    ("optimizer.use_distributed_optimizer", reduction("use_distributed_optimizer")),
    ("optimizer.use_distributed_optimizer", optimizer("true", "use_distributed_optimizer")),
    ("optimizer.overlap_grad_reduce", reduction("overlap_grad_reduce")),
    ("optimizer.overlap_param_gather", reduction("overlap_param_gather")),
    ("optimizer.overlap_param_gather", optimizer("true", "overlap_param_gather")),
    (
        "optimizer.gradient_accumulation_fusion",
        Seen("false", lambda seen: built(seen).fused_gradients, joint="optimizer"),
    ),
    ("training.steps", Seen("2", lambda s: len(s.metrics))),
    (
        "training.equal_flops",
        Seen("fused", lambda s: len(s.metrics), ANOTHER, (*STEPS, "refine.mode=ntp")),
    ),
    (
        "training.ntp_warmup_steps",
        Seen("2", lambda s: s.column("loss_policy").count(None), given=STEPS),
    ),
    ("training.micro_batch_size", Seen("2", texts_per_pass)),
    ("training.global_batch_size", Seen("3", texts_per_step)),
    # The root of a negative number: no loss is finite.
    (
        "training.max_skipped_steps",
        Seen(
            "0",
            lambda s: "in a row" in s.refused,
            True,
            ("model.overrides.norm_eps=-1e3", "refine.mode=ntp"),
        ),
    ),
    ("training.seed", Seen("5", weights_drawn, ANOTHER)),
    ("training.seed", changed("5", "rollout_tokens", *DEMO, "model.checkpoint=$checkpoint")),
    (
        "training.dtype",
        Seen("bfloat16", lambda s: built(s).dtype, torch.bfloat16),
    ),
    (
        "training.log_interval",
        Seen("2", lambda s: s.logged.count("ETA"), 2, (*STEPS, "run.progress=true")),
    ),
    # The states before the text, after 128 tokens and after 256.
    (
        "training.tape_interval",
        Seen("128", lambda s: s.kept_states[0], 3, ("data.sequence_length=256",)),
    ),
    (
        "training.recompute",
        Seen("full", lambda s: s.passes.count(32), ANOTHER, ("parallel.slices=2",)),
    ),
    (
        "training.recompute",
        Seen("selective", lambda s: built(s).model["selective_recompute"], True),
    ),
    ("parallel.tensor", layout("2", lambda b: b.group_sizes["tp"])),
    ("parallel.tensor", layout("2", lambda b: b.model["tensor_model_parallel_size"])),
    ("parallel.pipeline", layout("2", lambda b: b.group_sizes["pp"])),
    ("parallel.pipeline", layout("2", lambda b: b.model["pipeline_model_parallel_size"])),
    ("parallel.sequence_parallel", layout("true", lambda b: b.model["sequence_parallel"])),
    ("parallel.slices", Seen("2", lambda s: 32 in s.passes, True)),
    ("parallel.layers_per_stage", layout("[1, 2]", lambda b: b.layers, 1)),
    ("parallel.timeout", Seen("77", lambda s: built(s).timeouts, {77.0})),
    ("kernels.attention", layout("flash", lambda b: b.kernels["attention"])),
    ("kernels.branches", layout("triton", lambda b: b.kernels["branches"])),
    ("kernels.delta_rule", layout("triton", lambda b: b.kernels["delta_rule"])),
    ("kernels.lact", layout("triton", lambda b: b.kernels["lact"])),
    ("kernels.rms_norm", layout("triton", lambda b: b.kernels["rms_norm"])),
    ("kernels.rotary", layout("triton", lambda b: b.kernels["rotary"])),
    ("kernels.short_conv", layout("triton", lambda b: b.kernels["short_conv"])),
    ("kernels.swiglu", layout("triton", lambda b: b.kernels["swiglu"])),
    ("kernels.vocabulary", layout("triton", lambda b: b.kernels["vocabulary"])),
    (
        "checkpoint.load",
        Seen("$checkpoint", lambda s: s.column("step"), [1], (*DEMO, "training.steps=2")),
    ),
    ("checkpoint.save_interval", Seen("2", lambda s: s.saves, [2, 3], STEPS)),
    ("checkpoint.async_save", Seen("true", lambda s: s.published, [False], saves=True)),
    (
        "checkpoint.keep_last",
        Seen("1", lambda s: s.checkpoints, ["iter_0000003"], EVERY_STEP, saves=True),
    ),
    (
        "checkpoint.keep_every",
        Seen(
            "2",
            lambda s: s.checkpoints,
            ["iter_0000002", "iter_0000003"],
            (*EVERY_STEP, "checkpoint.keep_last=1"),
            saves=True,
        ),
    ),
    (
        "checkpoint.resume",
        Seen("never", lambda s: "resume is never" in s.refused, True, ("run.directory=$begun",)),
    ),
    (
        "checkpoint.allow_other_data",
        Seen(
            "true",
            lambda s: s.column("step"),
            [1],
            (*DEMO, "training.steps=2", "checkpoint.load=$checkpoint", "data.seed=5"),
        ),
    ),
    ("run.directory", Seen("$elsewhere", lambda s: str(built(s).directory))),
    ("run.tensorboard", Seen("true", lambda s: "tensorboard" in s.files)),
    ("run.progress", Seen("true", lambda s: "ETA" in s.logged)),
]

FIELDS = [
    f"{section}.{field.name}"
    for section, kind in get_type_hints(Config).items()
    for field in fields(kind)
]


class Runs:
    """Runs of one configuration, each made once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[Any, Observed] = {}
        self._paths = _write_inputs(directory)
        self.config = directory / "config.yaml"
        self.of((*DEMO, f"run.directory={directory / 'finished'}"), saves=True)

    def of(self, overrides: tuple[str, ...], **options: Any) -> Observed:
        overrides = self.resolved(overrides)
        key = (overrides, *options.values())
        if key not in self._made:
            directory = self._directory / f"run{len(self._made)}"
            self._made[key] = observe(self.config, directory, overrides, **options)
        return self._made[key]

    def resolved(self, overrides: tuple[str, ...]) -> tuple[str, ...]:
        """With the names of files in place of `$name`."""
        return tuple(string.Template(text).substitute(self._paths) for text in overrides)


def _write_inputs(directory: Path) -> dict[str, str]:
    """The base configuration, and what it and the settings name; nothing is left to defaults that
    a run would be long with."""
    with CORPUS.open(encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"][:6000] for _ in range(2)]
    for name, text in zip(("base", "other"), texts, strict=True):
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    (directory / "other.model").write_bytes(_swap_pieces(TOKENIZER.read_bytes(), b"the", b"and"))
    (directory / "begun").mkdir()
    (directory / "begun" / "config.yaml").touch()
    config = {
        "model": {"preset": "tiny-deltanet", "overrides": {"vocab_size": 2048}},
        "data": {
            "paths": [str(directory / "base.txt")],
            "tokenizer": str(TOKENIZER),
            "sequence_length": 64,
        },
        "refine": {"num_chunks": 3, "rollout_tokens": 4},
        "optimizer": {"lr": 1e-3},
        "training": {
            "steps": 1,
            "global_batch_size": 2,
            "dtype": "float32",
            "tape_interval": 64,
        },
        "run": {"tensorboard": False, "progress": False},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return {
        "text": str(directory / "other.txt"),
        "tokenizer": str(directory / "other.model"),
        "begun": str(directory / "begun"),
        "elsewhere": str(directory / "elsewhere"),
        "cache": str(directory / "cache"),
        "checkpoint": str(directory / "finished" / "checkpoints"),
    }


def _swap_pieces(model: bytes, one: bytes, other: bytes) -> bytes:
    """A SentencePiece model with the ids of two words of one length exchanged."""

    def piece(word: bytes) -> bytes:
        text = "\u2581".encode() + word
        return b"\n" + bytes([len(text)]) + text

    assert len(one) == len(other) and model.count(piece(one)) == model.count(piece(other)) == 1
    halves = [half.replace(piece(other), piece(one)) for half in model.split(piece(one))]
    return piece(other).join(halves)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def test_every_field_of_the_schema_is_in_the_table() -> None:
    named = list(dict.fromkeys(name for name, _ in TABLE))
    assert named == [name for name in FIELDS if name not in ELSEWHERE]
    assert set(FIELDS) > set(ELSEWHERE)
    assert all(Path(file).is_file() for file in ELSEWHERE.values())


@pytest.mark.parametrize(
    ("name", "setting"), TABLE, ids=[f"{name}-{setting.value}" for name, setting in TABLE]
)
def test_setting_takes_effect(name: str, setting: Seen, runs: Runs) -> None:
    together = [(name, setting.value)]
    if setting.joint is not None:
        together = [(other, s.value) for other, s in TABLE if s.joint == setting.joint]
    overrides = (*setting.given, *(f"{field}={value}" for field, value in together))
    options = {"ranks": setting.ranks, "saves": setting.saves}
    without = setting.of(runs.of(setting.given, **options))
    found = setting.of(runs.of(overrides, **options))
    assert found != without
    if setting.expected is THE_VALUE:
        config = load_config(runs.config, runs.resolved(overrides))
        section, _, field = name.partition(".")
        assert found == getattr(getattr(config, section), field)
    elif setting.expected is not ANOTHER:
        assert found == setting.expected


def test_runs_of_the_same_settings_are_the_same(runs: Runs) -> None:
    """Else a setting could seem to change what it does not."""
    alike = [
        runs.of((*OFF_POLICY, f"training.log_interval={n}"), ranks=1, saves=False) for n in (2, 3)
    ]
    timeless = [
        [{k: v for k, v in step.items() if k not in TIMES} for step in seen.metrics]
        for seen in alike
    ]
    assert timeless[0] == timeless[1]
    assert first_texts(alike[0]) == first_texts(alike[1])
    assert alike[0].passes == alike[1].passes
    assert weights_drawn(alike[0]) == weights_drawn(alike[1])
