"""One step by every mode: loss, rollouts and gradients, against prefix copies and definitions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refine_mcore.config import RefineConfig
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.packing import Documents
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.rollout.branches import Randomness
from refine_mcore.rollout.decode import draw_tokens
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import ReducedMetrics, StepAccumulator
from refine_mcore.step.refine_loss import TextBatch, choose_branches
from refine_mcore.training.step import TrainStep
from tests.models.zoo import (
    FAMILIES,
    NAMES,
    assert_same_gradients,
    gathered_gradients,
    gradients,
    random_tokens,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("short_chunks")
ModelOf = Callable[[str], FastWeightModel]
LENGTHS = (22, 15, 22, 19)  # valid tokens of each text; the rest is padding
CONFIG = RefineConfig(num_chunks=3, rollout_tokens=5, margin_left=2, margin_right=5)


def make_batches(*sizes: int) -> list[TextBatch]:
    """The four texts in micro-batches of the given sizes."""
    tokens, sample_index = random_tokens(4, 22), torch.tensor([3, 11, 5, 8])
    mask = torch.arange(22) < torch.tensor(LENGTHS)[:, None]
    cuts = [x.split(sizes) for x in (tokens, mask, sample_index)]
    return [TextBatch(*part) for part in zip(*cuts, strict=True)]


class Step:
    """One mode over micro-batches, every optimizer step without moving the weights."""

    def __init__(
        self,
        mode: str,
        model: FastWeightModel,
        batches: Sequence[TextBatch],
        config: RefineConfig = CONFIG,
        seed: int = 1,
    ) -> None:
        self.model, self.config = model, config
        accumulated = StepAccumulator()
        steps = optimizer_steps(mode, model, config, seed, batches, accumulated)
        self.gradients = [gathered_gradients(model, run) for run in steps]
        self.metrics: Any = accumulated.reduce(model.pg_collection, len(self.gradients))
        self._texts = accumulated.texts

    @property
    def rewards(self) -> Tensor:
        """Of all rollouts, in the order of the texts."""
        return torch.cat([record.rewards for record in self._texts])


def optimizer_steps(
    mode: str,
    model: FastWeightModel,
    config: RefineConfig,
    seed: int,
    batches: Sequence[TextBatch],
    metrics: StepAccumulator,
) -> Iterator[Callable[[], None]]:
    """Forward and backward of every optimizer step."""
    groups = model.pg_collection
    engine = PipelineEngine(wrapped(model), groups)
    train = TrainStep(wrapped(model), None, config, seed, groups, engine)
    context = StepContext(model, config, Randomness(seed, 2), groups.dp)
    return train.optimizer_steps(mode, context, batches, metrics)


def assert_same_step(actual: Step, expected: Step) -> None:
    """One optimizer step each, with the same rollouts, loss, gradient and log line."""
    assert torch.equal(actual.metrics.positions, expected.metrics.positions)
    assert torch.equal(actual.metrics.rollout_tokens, expected.metrics.rollout_tokens)
    numbers = [
        {key: value for key, value in vars(step.metrics).items() if isinstance(value, float)}
        for step in (actual, expected)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-9)
    (actual_gradient,), (expected_gradient,) = actual.gradients, expected.gradients
    assert_same_gradients(actual_gradient, expected_gradient)


@pytest.mark.parametrize("name", NAMES)
def test_modes_equal_copying_the_prefix(name: str, model_of: ModelOf) -> None:
    config = replace(CONFIG, rollouts_per_position=1 + NAMES.index(name) % 2)
    batches = make_batches(2, 2)[:1]
    reference = Step("prefix_copy", model_of(name), batches, config)
    for mode in ("fused", "two_phase"):
        step = Step(mode, model_of(name), batches, config)
        assert_same_step(step, reference)
        assert step.metrics.log_prob_drift < 1e-9


DOCUMENTS = Documents(((0, 1, 10), (0, 7)), 22)


@pytest.mark.parametrize("name", NAMES)
def test_packed_texts_equal_copying_the_prefix_of_a_document(name: str, model_of: ModelOf) -> None:
    (batch, _) = make_batches(2, 2)
    packed, model = replace(batch, documents=DOCUMENTS), model_of(name)
    reference = Step("prefix_copy", model, [packed])
    for mode in ("fused", "two_phase"):
        assert_same_step(Step(mode, model, [packed]), reference)
    # margins from the ends of a document, the second text's padding not in it
    for row, positions in enumerate(reference.metrics.positions.tolist()):
        spans = list(pairwise([*DOCUMENTS.starts[row], LENGTHS[row]]))
        assert all(any(a + 2 <= p <= b - 5 for a, b in spans) for p in positions), (row, positions)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_train_as_texts_of_their_own(name: str, model_of: ModelOf) -> None:
    """The next-token loss and its gradient, of each document in a text by itself."""
    (batch, _) = make_batches(2, 2)
    alone = []
    for row, of_row in enumerate(DOCUMENTS.starts):
        for start, stop in pairwise([*of_row, 22]):
            cut = slice(row, row + 1), slice(start, stop)
            index = batch.sample_index[row : row + 1]
            alone.append(TextBatch(batch.tokens[cut], batch.mask[cut], index))
    packed = Step("ntp", model_of(name), [replace(batch, documents=DOCUMENTS)])
    count = sum(int(text.num_targets()) for text in alone)
    losses: list[float] = []
    total: dict[str, Any] = {}
    for text in alone:
        targets = int(text.num_targets())
        if targets:
            step = Step("ntp", model_of(name), [text])
            losses.append(step.metrics.loss_ntp * targets / count)
            for key, gradient in step.gradients[0].items():
                total[key] = total.get(key, 0) + gradient * targets / count
    assert packed.metrics.loss_ntp == pytest.approx(sum(losses), rel=1e-9)
    assert_same_gradients(packed.gradients[0], total)


OPTIONS = [
    {"reward": "binary", "grouping": "joint", "rollouts_per_position": 3},
    {"reward": "hybrid", "grouping": "position", "rollouts_per_position": 2},
    {"reward": "edit", "reward_weights": (0.5, 2.0), "normalize_std": False},
    {"rollout_temperature": 0.6, "selection": "uniform", "aggregation": "seq-mean-token-sum"},
    {"selection": "argmax", "aggregation": "seq-mean-token-mean", "policy_weight": 3.0},
    {"selection": "argmin", "entropy_of": "prefix_token", "rollout_tokens": 1, "ntp_weight": 0.0},
    {"reward": "future", "future_tokens": 4, "margin_right": 9, "rollout_temperature": 0.6},
    {"grouping": "position", "rollouts_per_position": 4, "selection": "uniform"},
    {"rollout_entropy": 6.0, "reward": "hybrid", "rollouts_per_position": 2},
    {"rollout_entropy": 7.0, "reward": "edit", "aggregation": "seq-mean-token-mean"},
    {"pooling_ignores_padding": True, "smoothing_window": 2, "selection_temperature": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options_mean_the_same_in_every_mode(options: dict[str, Any], model_of: ModelOf) -> None:
    model, config, batches = model_of("delta_net"), replace(CONFIG, **options), make_batches(2, 2)
    modes = ("prefix_copy", "fused", "two_phase")
    steps = [Step(mode, model, batches, config) for mode in modes]
    assert all(torch.isfinite(g).all() for g in steps[0].gradients[0].values())
    for step in steps[1:]:
        assert_same_step(step, steps[0])


def test_rollouts_end_where_the_entropies_of_the_text_add_up(model_of: ModelOf) -> None:
    """Length and reward of every rollout by the entropies of whole texts; no loss comes from the
    tokens behind."""
    model, nats = model_of("delta_net"), 8.0
    config = replace(CONFIG, rollout_entropy=nats, reward="binary", policy_weight=1.0)
    step, k = Step("fused", model, make_batches(2, 2), config), config.rollout_tokens
    texts = random_tokens(4, 22)
    log_p = model.logits(model(texts).hidden).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    lengths, rewards = [], []
    for text, position, tokens in rollouts_of(step):
        along = entropy[text, position - 1 : position - 1 + k].cumsum(0).tolist()
        lengths.append(next((n + 1 for n, total in enumerate(along) if total >= nats), k))
        same = tokens == texts[text, position : position + k]
        rewards.append(same[: lengths[-1]].double().mean())
    assert len(set(lengths)) > 1
    assert step.metrics.rollout_length == pytest.approx(sum(lengths) / len(lengths))
    torch.testing.assert_close(step.rewards.flatten(), torch.stack(rewards), rtol=0, atol=1e-12)

    # one token each, as with k = 1 but for the denominator
    config = replace(config, reward="cosine", smoothing_window=5, ntp_weight=0.0)
    short = Step("fused", model, make_batches(2, 2), replace(config, rollout_entropy=1e-6))
    single = replace(config, rollout_tokens=1, rollout_entropy=None, policy_weight=1 / k)
    cut = Step("fused", model, make_batches(2, 2), single)
    assert short.metrics.rollout_length == 1
    assert torch.equal(cut.metrics.positions, short.metrics.positions)
    assert cut.metrics.reward_mean == pytest.approx(short.metrics.reward_mean)
    assert_same_gradients(short.gradients[0], cut.gradients[0])


def rollouts_of(step: Step) -> list[tuple[int, int, Tensor]]:
    """(text, position, tokens [k]) of every rollout, in the order of the four texts."""
    order = torch.tensor([3, 11, 5, 8]).argsort().argsort()
    n, k = step.config.rollouts_per_position, step.config.rollout_tokens
    positions = step.metrics.positions[order].repeat_interleave(n, dim=1)
    tokens = step.metrics.rollout_tokens[order].reshape(*positions.shape, k)
    return [
        (text, int(positions[text, rollout]), tokens[text, rollout])
        for text in range(positions.shape[0])
        for rollout in range(positions.shape[1])
    ]


def full_run_log_probs(model: FastWeightModel, rollouts: list[tuple[int, int, Tensor]]) -> Tensor:
    """[R, k] from one run over prefix and rollout each."""
    found = []
    texts = random_tokens(4, 22)
    for text, position, tokens in rollouts:
        hidden = model(torch.cat([texts[text, :position], tokens])[None]).hidden
        log_p = model.logits(hidden)[0, position - 1 : -1].log_softmax(-1)
        found.append(log_p.gather(1, tokens[:, None])[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_rewards_compare_rollouts_with_the_text_that_follows(name: str, model_of: ModelOf) -> None:
    """Mean cosine of the hidden states after each rollout token and after the text's own."""
    model, k = model_of(name), CONFIG.rollout_tokens
    step = Step("fused", model, make_batches(2, 2))
    texts = random_tokens(4, 22)
    text_hidden = model(texts).hidden
    expected = []
    for text, position, tokens in rollouts_of(step):
        rollout = model(torch.cat([texts[text, :position], tokens])[None]).hidden[0, position:]
        following = text_hidden[text, position : position + k]
        expected.append(F.cosine_similarity(rollout, following, dim=-1).mean())
    torch.testing.assert_close(step.rewards.flatten(), torch.stack(expected), rtol=0, atol=1e-9)


FUTURE = replace(CONFIG, reward="future", future_tokens=4, margin_right=9, rollout_temperature=0.7)


@pytest.mark.parametrize("name", NAMES)
def test_future_reward_is_what_the_text_behind_gains(name: str, model_of: ModelOf) -> None:
    """Mean log-prob of the m text tokens behind the span, each text read from its beginning with
    the rollout in place of its own tokens, less the same in the text as it is."""
    model, k, m = model_of(name), FUTURE.rollout_tokens, FUTURE.future_tokens
    config = replace(FUTURE, rollouts_per_position=1 + NAMES.index(name) % 2)
    steps = [Step(mode, model, make_batches(2, 2), config) for mode in ("fused", "two_phase")]
    texts = random_tokens(4, 22)

    def behind(text: int, position: int, span: Tensor) -> Tensor:
        following = texts[text, position + k : position + k + m]
        read = torch.cat([texts[text, :position], span, following])
        log_p = model.logits(model(read[None]).hidden)[0].log_softmax(-1)[-m - 1 : -1]
        return log_p.gather(1, following[:, None]).mean()

    with torch.no_grad():
        expected = [
            behind(text, position, tokens)
            - behind(text, position, texts[text, position : position + k])
            for text, position, tokens in rollouts_of(steps[0])
        ]
    for step in steps:
        found = step.rewards.flatten()
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-9)
        assert found.std() > 1e-3


@pytest.mark.parametrize("options", [{}, {"reward": "future", "future_tokens": 4}])
def test_rewards_shape_the_gradient_through_advantages_alone(
    options: dict[str, Any], model_of: ModelOf
) -> None:
    """n = 4 rollouts of uniform positions, each measured by the others of its position: the
    gradient is that of -A log p of the rolled tokens alone, from runs over prefix and rollout."""
    model = model_of("gated_delta_net")
    config = replace(CONFIG, margin_right=9, ntp_weight=0.0, rollouts_per_position=4, **options)
    config = replace(config, grouping="position", selection="uniform")
    step = Step("fused", model, make_batches(2, 2), config)
    rewards = step.rewards.reshape(-1, 4)
    spread = rewards.std(1, keepdim=True) + 1e-6
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()
    log_probs = full_run_log_probs(model, rollouts_of(step))
    loss = -(advantages[:, None] * log_probs).mean() * config.policy_weight
    assert_same_gradients(step.gradients[0], gradients(model, loss))
    chunks = torch.tensor(LENGTHS)[[0, 2, 3, 1]] // 3  # in the order of the samples 3, 5, 8, 11
    start = chunks[:, None] * torch.arange(3)
    last = torch.tensor(LENGTHS)[[0, 2, 3, 1], None] - 9
    positions = step.metrics.positions
    assert (positions >= (start + 1).clamp(min=2).minimum(last)).all()
    assert (positions <= (start + chunks[:, None]).clamp(min=2).minimum(last)).all()


def test_positions_lie_where_the_text_is_least_certain(model_of: ModelOf) -> None:
    """`argmax` in every third of the valid tokens, by the entropy of the first rollout token."""
    model = model_of("delta_net")
    step = Step("fused", model, make_batches(4), replace(CONFIG, selection="argmax"))
    log_p = model.logits(model(random_tokens(4, 22)).hidden).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = []
    for text, length in enumerate(LENGTHS):
        size = length // CONFIG.num_chunks
        for start in range(0, size * CONFIG.num_chunks, size):
            position = start + int(entropy[text, start : start + size].argmax()) + 1
            expected.append(min(max(position, CONFIG.margin_left), length - CONFIG.margin_right))
    assert [position for _, position, _ in rollouts_of(step)] == expected
    valid = [entropy[text, :length] for text, length in enumerate(LENGTHS)]
    assert step.metrics.entropy_mean == pytest.approx(torch.cat(valid).mean().item())


def mean_ntp_loss(model: FastWeightModel) -> Tensor:
    """torch's cross entropy over the valid targets of the four texts."""
    tokens = random_tokens(4, 22)
    logits = model.logits(model(tokens).hidden)
    rows = [(logits[b, : n - 1], tokens[b, 1:n]) for b, n in enumerate(LENGTHS)]
    return F.cross_entropy(torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows]))


@pytest.mark.parametrize("name", FAMILIES)
def test_next_token_mode_is_the_mean_cross_entropy(name: str, model_of: ModelOf) -> None:
    """Whatever the weight that it has beside a policy loss."""
    model = model_of(name)
    step = Step("ntp", model, make_batches(1, 3), replace(CONFIG, ntp_weight=0.3))
    expected = mean_ntp_loss(model)
    assert step.metrics.loss_ntp == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(step.gradients[0], gradients(model, expected))
    assert step.metrics == ReducedMetrics(loss_ntp=step.metrics.loss_ntp)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_is_that_of_the_objective_as_written(name: str, model_of: ModelOf) -> None:
    """ntp_weight * NTP - policy_weight * mean of A log p, for the rollouts and rewards reported."""
    model = model_of(name)
    config = replace(CONFIG, ntp_weight=0.7, policy_weight=1.3)
    step = Step("fused", model, make_batches(1, 2, 1), config)
    rewards = step.rewards
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    log_probs = full_run_log_probs(model, rollouts_of(step))
    policy = -(advantages.flatten()[:, None] * log_probs).mean()
    assert_same_gradients(
        step.gradients[0], gradients(model, 0.7 * mean_ntp_loss(model) + 1.3 * policy)
    )
    assert step.metrics.loss_policy == pytest.approx(0.0, abs=1e-9)  # -mean A at ratio 1


@pytest.mark.parametrize("mode", ["fused", "two_phase"])
@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_do_not_show(name: str, mode: str, model_of: ModelOf) -> None:
    whole = Step(mode, model_of(name), make_batches(4))
    for sizes in ((2, 2), (1, 1, 1, 1), (3, 1)):
        assert_same_step(Step(mode, model_of(name), make_batches(*sizes)), whole)


@pytest.mark.parametrize("mode", ["fused", "two_phase", "prefix_copy"])
def test_drift_is_what_decoding_and_scoring_disagree_by(
    mode: str, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean absolute difference: of log-probs that decoding has off by 1/2, up and down."""
    errors = cycle((0.5, -0.5))

    def off(*arguments: Any) -> tuple[Tensor, Tensor]:
        tokens, log_probs = draw_tokens(*arguments)
        return tokens, log_probs + next(errors)

    for module in ("rollout.decode", "pipeline.head"):
        monkeypatch.setattr(f"refine_mcore.{module}.draw_tokens", off)
    step = Step(mode, model_of("delta_net"), make_batches(1, 3))
    assert step.metrics.log_prob_drift == pytest.approx(0.5)


def test_draws_follow_seed_and_sample(model_of: ModelOf) -> None:
    model, config = model_of("delta_net"), replace(CONFIG, rollouts_per_position=4)
    first, same = (Step("fused", model, make_batches(4), config) for _ in range(2))
    other = Step("fused", model, make_batches(4), config, seed=2)
    assert torch.equal(first.metrics.rollout_tokens, same.metrics.rollout_tokens)
    assert not torch.equal(first.metrics.rollout_tokens, other.metrics.rollout_tokens)
    rollouts = first.metrics.rollout_tokens.reshape(-1, 4, config.rollout_tokens)
    assert all(len({tuple(rollout) for rollout in group.tolist()}) > 1 for group in rollouts)

    batch = make_batches(4)[0]
    moved = replace(batch, sample_index=batch.sample_index + 100)
    elsewhere = Step("fused", model, [moved], config)
    assert not torch.equal(first.metrics.rollout_tokens, elsewhere.metrics.rollout_tokens)


@pytest.mark.parametrize("selection", ["entropy", "uniform", "argmax", "argmin"])
def test_positions_keep_their_margins(selection: Any, model_of: ModelOf) -> None:
    config = replace(CONFIG, selection=selection, margin_left=4, margin_right=7)
    for seed in range(5):
        step = Step("fused", model_of("delta_net"), make_batches(4), config, seed)
        for text, position, _ in rollouts_of(step):
            assert 4 <= position <= LENGTHS[text] - 7


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_has_no_influence(name: str, model_of: ModelOf) -> None:
    (batch,) = make_batches(4)
    filled = replace(batch, tokens=torch.where(batch.mask, batch.tokens, 7))
    assert not torch.equal(batch.tokens, filled.tokens)
    for mode in ("fused", "two_phase"):
        assert_same_step(Step(mode, model_of(name), [filled]), Step(mode, model_of(name), [batch]))


def test_what_follows_a_text_has_no_say_in_its_positions(model_of: ModelOf) -> None:
    """Padding, and the answers behind prompts."""
    (batch,) = make_batches(4)
    config = replace(CONFIG, smoothing_window=5, rollout_entropy=8.0)
    for seed in range(20):
        entropy = torch.rand(4, 22, generator=torch.Generator().manual_seed(seed)) * 5
        behind = torch.where(batch.mask, entropy, 50 * entropy)
        (first, _), (second, _) = (
            choose_branches(model_of("delta_net"), x, batch, config, Randomness(seed, 0))
            for x in (entropy, behind)
        )
        assert first == second


def test_mini_batches_are_steps_of_their_own(model_of: ModelOf) -> None:
    """Without an update between them, each is a fused step on its texts."""
    model, batches = model_of("gated_delta_net"), make_batches(1, 1, 1, 1)
    step = Step("two_phase", model, batches, replace(CONFIG, mini_batch_size=2))
    assert len(step.gradients) == 2
    for part, gradient in zip((batches[:2], batches[2:]), step.gradients, strict=True):
        assert_same_gradients(gradient, Step("fused", model, part).gradients[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_later_mini_batches_see_the_ratio_to_the_old_policy(name: str, model_of: ModelOf) -> None:
    """The second optimizer step against the clipped loss by hand, after the weights have moved."""
    model, batches, metrics = model_of(name), make_batches(2, 2), StepAccumulator()
    reference = Step("fused", model, batches)
    config = replace(CONFIG, mini_batch_size=2, ntp_weight=0.0, policy_weight=1.0)
    steps = optimizer_steps("two_phase", model, config, 1, batches, metrics)
    second = [rollout for rollout in rollouts_of(reference) if rollout[0] >= 2]
    old = full_run_log_probs(model, second).detach()
    rewards = reference.rewards[2:]
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    advantage = advantages.reshape(-1, 1)

    next(steps)()
    metrics.sums.clear()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn_like(p)
        gradient = gathered_gradients(model, next(steps))
        ratio = (full_run_log_probs(model, second) - old).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        worst = torch.maximum(-advantage * ratio, -advantage * clipped)
        bounded = torch.where(advantage < 0, worst.minimum(-advantage * config.dual_clip), worst)
        assert_same_gradients(gradient, gradients(model, bounded.mean()))
        # what the log shows of rollouts was known before
        metrics.texts.clear()
        policy = metrics.sums["loss_policy"].item()
        assert policy == pytest.approx(bounded.mean().item(), rel=1e-9)
        clipped_share = (metrics.sums["clipped"] / metrics.sums["policy_tokens"]).item()
        fraction = (-advantage * clipped > -advantage * ratio).double().mean().item()
        assert clipped_share == pytest.approx(fraction) and fraction > 0
    finally:
        with torch.no_grad():
            for p, value in zip(model.parameters(), before, strict=True):
                p.copy_(value)


@pytest.mark.parametrize("mode", ["fused", "two_phase"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fraction_of_the_texts_rolls_out(name: str, mode: str, model_of: ModelOf) -> None:
    """The first half of them, whatever the micro-batches; the next-token loss is that of all."""
    model, ours = model_of(name), replace(CONFIG, ntp_weight=0.7, policy_weight=1.3)
    half = replace(ours, rollout_fraction=0.5)
    first = Step("fused", model, make_batches(2, 2)[:1], ours)
    policy_only = Step("fused", model, make_batches(2, 2)[:1], replace(ours, ntp_weight=0.0))
    ntp = Step("ntp", model, make_batches(2, 2))
    expected = {
        key: 0.7 * ntp.gradients[0][key] + gradient
        for key, gradient in policy_only.gradients[0].items()
    }
    for sizes in ((2, 2), (1, 1, 1, 1)):
        step = Step(mode, model, make_batches(*sizes), half)
        assert_same_gradients(step.gradients[0], expected)
        assert step.metrics.loss_ntp == pytest.approx(ntp.metrics.loss_ntp, rel=1e-12)
        for column in ("positions", "rollout_tokens"):
            assert torch.equal(getattr(step.metrics, column), getattr(first.metrics, column))
        for column in ("reward_mean", "reward_std", "entropy_mean"):
            found = getattr(step.metrics, column)
            assert found == pytest.approx(getattr(first.metrics, column), rel=1e-9)


def test_a_fraction_holds_in_every_mini_batch(model_of: ModelOf) -> None:
    model, batches = model_of("gated_delta_net"), make_batches(1, 1, 1, 1)
    config = replace(CONFIG, mini_batch_size=2, rollout_fraction=0.5)
    step = Step("two_phase", model, batches, config)
    for part, gradient in zip((batches[:2], batches[2:]), step.gradients, strict=True):
        alone = Step("fused", model, part, replace(CONFIG, rollout_fraction=0.5))
        assert_same_gradients(gradient, alone.gradients[0])
