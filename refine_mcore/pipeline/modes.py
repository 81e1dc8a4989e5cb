"""The modes of a training step as data: which micro-batches roll out, which train on stored
rollouts, when the optimizer steps. The engine runs each of them at every layout.

An optimizer step trains on

    ntp_weight * NTP + policy_weight * policy        (paper, section 3; both over global counts)

* `ntp`: the next-token loss alone, unweighted. A run of this mode is the baseline of one in
  `two_phase`, and takes its optimizer steps: one per mini-batch. (The authors' baseline takes one
  per batch. So does the next-token warm-up of a run in another mode.)
* `sft`: the same in one optimizer step per batch in any run, for texts whose targets are answers.
* `fused`: one forward over the text, rollouts branched in place from its states, one optimizer step
  for both losses.
* `two_phase`: the paper's schedule. Rollouts, old log-probs and rewards for the whole batch first,
  without gradients; then one optimizer step per mini-batch on the stored rollouts.

With `refine.rollout_fraction` below 1 the first texts of each optimizer step roll out and the
others train on the next-token loss alone (a departure from the paper). Their micro-batches take
turns, so that in a pipeline the text passes of one fill the wait for the decode passes of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refine_mcore.config import RefineConfig, rollout_micro_batches
from refine_mcore.pipeline.passes import Phase


@dataclass(frozen=True)
class Part:
    """One plan's worth of a training step.

    `micro_batches` are numbers within the batch, in the order in which they run, and `rolls_out`
    says which of them roll out. An optimizer step follows, except in the phase `rollout`.
    """

    phase: Phase
    micro_batches: tuple[int, ...]
    rolls_out: tuple[bool, ...]


def parts_of_step(
    mode: str, config: RefineConfig, micro_batches: int, sequences_per_micro_batch: int
) -> list[Part]:
    """What a mode does with a batch of so many micro-batches on each rank, of so many sequences
    over all of them."""
    everything, per_step = tuple(range(micro_batches)), micro_batches
    takes_mini_batches = mode == "two_phase" or mode == config.mode == "ntp"
    if takes_mini_batches and config.mini_batch_size is not None:
        per_step = config.mini_batch_size // sequences_per_micro_batch
    steps = [everything[start : start + per_step] for start in range(0, micro_batches, per_step)]
    if mode in ("ntp", "sft"):
        return [Part("fused", step, (False,) * len(step)) for step in steps]
    rolling = rollout_micro_batches(config, per_step)
    phase: Phase = "train" if mode == "two_phase" else "fused"
    training = [_train(phase, step[:rolling], step[rolling:]) for step in steps]
    if mode == "fused":
        return training
    first = tuple(index for step in steps for index in step[:rolling])
    return [Part("rollout", first, (True,) * len(first)), *training]


def _train(phase: Phase, rolling: Sequence[int], others: Sequence[int]) -> Part:
    """Both kinds spread evenly over the step, beginning with one that rolls out."""
    placed = [
        (place / len(kind), index, rolls_out)
        for kind, rolls_out in ((rolling, True), (others, False))
        for place, index in enumerate(kind)
    ]
    placed.sort(key=lambda item: item[0])
    _, order, kinds = zip(*placed, strict=True)
    return Part(phase, order, kinds)
