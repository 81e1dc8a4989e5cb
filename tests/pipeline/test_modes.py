"""What each mode does with a batch, as data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refine_mcore.config import RefineConfig, rollout_micro_batches
from refine_mcore.errors import UserError
from refine_mcore.pipeline.modes import Part, parts_of_step

CONFIG = RefineConfig()


def test_one_optimizer_step_on_everything() -> None:
    assert parts_of_step("ntp", CONFIG, 3, 2) == [Part("fused", (0, 1, 2), (False,) * 3)]
    assert parts_of_step("fused", CONFIG, 2, 2) == [Part("fused", (0, 1), (True, True))]


def test_rollouts_of_the_batch_then_a_step_per_mini_batch() -> None:
    """Of 4 sequences, two a micro-batch over all ranks. Without a size the batch is one."""
    mini = replace(CONFIG, mini_batch_size=4)
    assert parts_of_step("two_phase", mini, 4, 2) == [
        Part("rollout", (0, 1, 2, 3), (True,) * 4),
        Part("train", (0, 1), (True, True)),
        Part("train", (2, 3), (True, True)),
    ]
    assert [part.phase for part in parts_of_step("two_phase", CONFIG, 4, 2)] == ["rollout", "train"]


def test_a_fraction_rolls_out_in_every_step_and_takes_turns_with_the_rest() -> None:
    half = replace(CONFIG, rollout_fraction=0.5)
    (part,) = parts_of_step("fused", half, 6, 1)
    assert part == Part("fused", (0, 3, 1, 4, 2, 5), (True, False) * 3)
    rollout, *training = parts_of_step("two_phase", replace(half, mini_batch_size=4), 8, 1)
    assert rollout == Part("rollout", (0, 1, 4, 5), (True,) * 4)
    assert [part.micro_batches for part in training] == [(0, 2, 1, 3), (4, 6, 5, 7)]
    assert [part.rolls_out for part in training] == [(True, False) * 2] * 2
    # the mode ntp rolls nothing out, whatever the fraction
    assert parts_of_step("ntp", half, 1, 1) == [Part("fused", (0,), (False,))]


@pytest.mark.parametrize(
    ("fraction", "micro_batches", "rolling"),
    [(1.0, 1, 1), (0.25, 8, 2), (1 / 3, 3, 1), (0.1, 10, 1)],
)
def test_fractions_come_to_whole_micro_batches(
    fraction: float, micro_batches: int, rolling: int
) -> None:
    config = RefineConfig(rollout_fraction=fraction)
    assert rollout_micro_batches(config, micro_batches) == rolling


@pytest.mark.parametrize(("fraction", "such_as"), [(0.4, 0.5), (0.01, 0.25), (0.9, 1)])
def test_other_fractions_name_one_that_works(fraction: float, such_as: float) -> None:
    with pytest.raises(UserError, match=f"takes multiples of 1/4, such as {such_as:g}$"):
        rollout_micro_batches(RefineConfig(rollout_fraction=fraction), 4)
