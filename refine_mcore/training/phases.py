"""The phases of training over the one training step: what each trains on, and which updates it
makes of a batch. An update is one call of `TrainStep`, in a mode of `pipeline/modes.py`.

* Mid-training: one update on windows of long documents.
* Post-training, the paper's "nested learning": of every batch of prompts with answers first an
  inner update on the prompts alone, then an outer one, one optimizer step on the answers given the
  prompts. Both move the same weights by the same optimizer: they alternate, and no gradient goes
  through the inner update. Without the inner one it is plain SFT, with `refine.mode` ntp the
  paper's Nested SFT, which takes as many optimizer steps as ReFINE (the authors' takes one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from refine_mcore.config import Config
from refine_mcore.data import Samples, Tokenizer, build_dataset, build_examples, build_packed
from refine_mcore.step.refine_loss import TextBatch


@dataclass(frozen=True)
class Update:
    """Micro-batches and the mode in which they are trained on; `sft` is on answers."""

    micro_batches: Sequence[TextBatch]
    mode: str


class Phase(Protocol):
    """A phase of training, as a run's configuration has it."""

    _config: Config

    def __init__(self, config: Config) -> None:
        self._config = config

    @property
    def modes(self) -> list[str]:
        """Of the updates of a batch, in their order, after any warm-up."""

    def samples(self, tokenizer: Tokenizer, vocab_size: int, directory: Path) -> Samples:
        """What to train on; every rank calls this. Tokens may be kept in `directory`."""

    def identity(self) -> dict[str, Any]:
        """Settings that decide the samples, beside those that decide them in every phase."""

    def texts(self, batch: TextBatch) -> TextBatch:
        """What of a batch is rolled out."""
        return batch

    def updates(self, micro_batches: Sequence[TextBatch], step: int) -> list[Update]:
        """Of this rank's share of batch `step`."""


class MidTraining(Phase):
    """Next-token warm-up, then ReFINE steps, on long documents."""

    @property
    def modes(self) -> list[str]:
        return [self._config.refine.mode]

    def samples(self, tokenizer: Tokenizer, vocab_size: int, directory: Path) -> Samples:
        data = self._config.data
        if data.packing == "documents":
            return build_packed(data, tokenizer, vocab_size, directory, self._shortest)
        return build_dataset(data, tokenizer, vocab_size, directory)

    @property
    def _shortest(self) -> int:
        """Tokens of a document in which there is a position to roll out at. That every packed
        window has one does not depend on the mode: a baseline trains on the same windows."""
        refine = self._config.refine
        return refine.margin_left + refine.margin_right

    def identity(self) -> dict[str, Any]:
        identity = packing_identity(self._config)
        return identity and identity | {"refine.margin_left + margin_right": self._shortest}

    def updates(self, micro_batches: Sequence[TextBatch], step: int) -> list[Update]:
        return [Update(micro_batches, _mode(self._config, step))]


class PostTraining(Phase):
    """An inner update on the prompts, unless switched off, and an outer one on their answers."""

    @property
    def modes(self) -> list[str]:
        inner = [self._config.refine.mode] if self._config.posttrain.inner else []
        return [*inner, "sft"]

    def samples(self, tokenizer: Tokenizer, vocab_size: int, directory: Path) -> Samples:
        shortest = shortest_prompt(self._config) if self._config.posttrain.inner else 1
        return build_examples(self._config.data, tokenizer, vocab_size, shortest)

    def identity(self) -> dict[str, Any]:
        return {
            "data.max_answer_tokens": self._config.data.max_answer_tokens,
            "data.answer_eos": self._config.data.answer_eos,
            **packing_identity(self._config),
        }

    def texts(self, batch: TextBatch) -> TextBatch:
        return batch.prompts()

    def updates(self, micro_batches: Sequence[TextBatch], step: int) -> list[Update]:
        outer = Update(micro_batches, "sft")
        if not self._config.posttrain.inner:
            return [outer]
        prompts = [self.texts(batch) for batch in micro_batches]
        return [Update(prompts, _mode(self._config, step)), outer]


def packing_identity(config: Config) -> dict[str, Any]:
    """Whether samples are packed; nothing where they are not, as of runs that could not be."""
    packing = config.data.packing
    return {} if packing == "none" else {"data.packing": packing}


def shortest_prompt(config: Config) -> int:
    """Fewest tokens of a prompt that can be trained on by itself."""
    refine = config.refine
    if refine.mode == "ntp":
        return 2
    return max(refine.margin_left + refine.margin_right, refine.num_chunks)


def _mode(config: Config, step: int) -> str:
    return "ntp" if step < config.training.ntp_warmup_steps else config.refine.mode
