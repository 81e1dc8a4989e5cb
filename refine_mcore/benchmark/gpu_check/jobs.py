"""How the checks build and run training steps and score models. The one module of this package that
knows the entry points of training."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from refine_mcore import platform
from refine_mcore.benchmark.bench import Bench
from refine_mcore.config import Config, ParallelConfig, config_from_dict
from refine_mcore.conversion.description import read_description
from refine_mcore.conversion.hf_directory import open_hf_directory
from refine_mcore.conversion.importing import import_hf
from refine_mcore.evaluation.golden import ROLLOUT_TOKENS, rollout_positions
from refine_mcore.evaluation.score import score_tokens
from refine_mcore.models.sharding import full_tensors, main_gradient
from refine_mcore.training.setup import training_model

# The families of the step, in tiny. Initial weights are large, so that what a state holds matters
# to everything behind it; LaCT's chunks have twice the tokens that its fast heads are wide, as
# gradients of less than full rank have Muon amplify what rounding puts into the rest.
_COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_layers": 2,
    "intermediate_size": 96,
    "initializer_range": 0.1,
}
_ATTENTION = {"layers": (1,), "num_heads": 4, "num_kv_heads": 2, "window_size": 50}
_LACT = {"mixer.chunk_size": 64, "mixer.window_size": 48}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deltanet": ("tiny-deltanet", {}),
    "gated-deltanet": ("tiny-gated-deltanet", {"mixer.head_dim": 32}),
    "lact": ("tiny-lact", _LACT),
    "hybrid": ("tiny-deltanet", {"attention": _ATTENTION}),
}
FAMILIES = tuple(_FAMILIES)
# Two texts of this many tokens, one at a time: several chunks, and states kept on the tape.
_LENGTH, _TEXTS = 200, 2
# Of LaCT, of which rollouts from both texts read weights of two chunks and reach the end of none.
_GRAPH_CHUNK = 95
_SHORT_TEXT = 6000  # characters: more than those texts have

LAYOUTS = {
    "one rank": ParallelConfig(),
    "TP 2": ParallelConfig(tensor=2),
    "PP 2": ParallelConfig(pipeline=2, slices=3),
    "DP 2": ParallelConfig(),
}


class PlannedWait(NamedTuple):
    """A place where the host waits for the device on purpose: a frame of `function` (any if None)
    in a file that ends with `file`, so often per micro-batch (None: at the end of the step)."""

    what: str
    file: str
    function: str | None
    per_micro_batch: int | None


PLANNED_WAITS = (
    PlannedWait("positions", "step/refine_loss.py", "choose_branches", 1),
    PlannedWait("gradient norm", "optimizer/optimizer.py", "get_grad_norm", None),
    PlannedWait("metrics", "step/metrics.py", None, None),
)


@dataclass(frozen=True)
class Texts:
    """Where the texts of the steps are: in the checkout `root` the shipped documents and their
    tokenizer, in `scratch` the little of them that tiny models read."""

    root: Path
    scratch: Path

    def write_short_text(self) -> None:
        """Everyone who has the same `scratch` reads it."""
        with self._data("public_domain.jsonl").open(encoding="utf-8") as file:
            text = json.loads(file.readline())["text"]
        self._short_text.write_text(text[:_SHORT_TEXT], encoding="utf-8")

    def settings(self, length: int, vocabulary: int, *, short: bool) -> dict[str, Any]:
        """The `data` section for windows of `length` tokens, for a model of any vocabulary."""
        return {
            "paths": [str(self._short_text if short else self._data("public_domain.jsonl"))],
            "tokenizer": str(self._data("tokenizer.model")),
            "sequence_length": length,
            "unused_vocabulary": vocabulary,
        }

    @property
    def _short_text(self) -> Path:
        return self.scratch / "text.txt"

    def _data(self, name: str) -> Path:
        return self.root / "examples" / "data" / name


def tiny_job(texts: Texts, family: str, layout: str = "one rank") -> Config:
    """A float32 step of a tiny model of `family`, whose optimizer leaves weights and gradients as
    they are: the learning rate is below their precision, nothing is clipped."""
    preset, overrides = _FAMILIES[family]
    config = config_from_dict(
        {
            "model": {"preset": preset},
            "data": texts.settings(_LENGTH, _COMMON["vocab_size"], short=True),
            "refine": {"num_chunks": 4, "rollout_tokens": 4, "rollouts_per_position": 2},
            "optimizer": {"lr": 1e-30, "clip_grad": 0.0},
            "training": {
                "dtype": "float32",
                "global_batch_size": _TEXTS,
                "micro_batch_size": 1,
                "tape_interval": 64,
            },
        },
        "the checks",
    )
    model = replace(config.model, overrides=_COMMON | overrides)
    return replace(config, model=model, parallel=LAYOUTS[layout])


def full_size_job(
    texts: Texts, preset: str, overrides: dict[str, Any], length: int, dtype: str
) -> Config:
    """Steps on one text of `length` tokens, of a preset changed by `overrides`."""
    return config_from_dict(
        {
            "model": {"preset": preset, "overrides": overrides},
            "data": texts.settings(length, 32000, short=False),
            "training": {"dtype": dtype, "global_batch_size": 1, "micro_batch_size": 1},
        },
        "the checks",
    )


def step_results(config: Config, mode: str) -> dict[str, Tensor]:
    """What one step comes to, on the host: `metric.` (losses, rewards, positions, rollout tokens)
    and `gradient.` tensors by name. Every rank calls it; the gradients are on the first alone."""
    return _results(Bench(config), mode)


def _results(bench: Bench, mode: str) -> dict[str, Tensor]:
    metrics, _ = bench.run_step(bench.batches, 0, mode)
    found = {
        f"metric.{name}": torch.as_tensor(value).cpu()
        for name, value in vars(metrics).items()
        if value is not None
    }
    vocabulary = _COMMON["vocab_size"]  # what lies behind it is padding of the layout
    for name, gradient in full_tensors(bench.model.module, main_gradient).items():
        trimmed = gradient[:vocabulary] if gradient.shape[0] > vocabulary else gradient
        found[f"gradient.{name}"] = trimmed.clone()
    return found


def decoded_as_graphs(
    texts: Texts, family: str
) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(kinds of rollouts of a family that are decoded as CUDA graphs, what a fused step comes to
    with them, and without)."""
    config = tiny_job(texts, family)
    if family == "lact":
        overrides = config.model.overrides | {"mixer.chunk_size": _GRAPH_CHUNK}
        config = replace(config, model=replace(config.model, overrides=overrides))
    bench = Bench(config)
    found = _results(bench, "fused")
    training = replace(config.training, decode_graphs=False)
    by_operation = step_results(replace(config, training=training), "fused")
    return bench.engine.decoder.num_graphs, found, by_operation


def watched_step(texts: Texts, family: str, mode: str) -> tuple[Callable[[], Any], int]:
    """(a step as runs make them, in bfloat16 and with a clipped gradient, on texts that an earlier
    one has seen, at other positions; its micro-batches): what a first step sets up is there."""
    config = tiny_job(texts, family)
    bench = Bench(
        replace(
            config,
            training=replace(config.training, dtype="bfloat16"),
            optimizer=replace(config.optimizer, clip_grad=1.0),
        )
    )
    # second rollouts of a kind, which LaCT has not in every text, have their decode passes captured
    for warm_up in range(1 if platform.graph_capture() is None else 3):
        bench.run_step(bench.batches, warm_up, mode)
    return partial(bench.run_step, bench.batches, 3, mode), len(bench.batches)


def timed_step(config: Config) -> Callable[[str], float]:
    """A function that runs a step of the given mode and returns its next-token loss."""
    bench = Bench(config)

    def step(mode: str) -> float:
        metrics, _ = bench.run_step(bench.batches, 0, mode)
        return metrics.loss_ntp

    return step


def score_reference(model: Path, checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores of texts A and B of the reference in folder `model`, in float32 on the device;
    `checkpoint` is where its converted weights go."""
    import_hf(open_hf_directory(model), checkpoint)
    config = config_from_dict(
        {"model": {"checkpoint": str(checkpoint)}, "training": {"dtype": "float32"}}, "the checks"
    )
    inputs = load_file(model / "inputs.safetensors")
    groups = platform.initialize_model_parallel(seed=config.training.seed)

    def score(text: str, **options: Any) -> dict[str, Tensor]:
        tokens = inputs[f"input_ids_{text}"].to(platform.device())
        # gradients gather in a model: each text has its own
        return score_tokens(
            training_model(config, groups),
            groups,
            tokens,
            gradients=True,
            parameters=read_description(checkpoint).parameters(),
            **options,
        )

    rollouts: dict[str, Any] = {
        "rollout_at": rollout_positions(model),
        "rollout_tokens": ROLLOUT_TOKENS,
    }
    return score("a", **rollouts), score("b")


def free_memory() -> None:
    """Let go of the last model: Megatron's objects refer to each other."""
    gc.collect()
    if platform.device().type == "cuda":
        torch.cuda.empty_cache()
