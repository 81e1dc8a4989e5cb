"""Everything a run can be told, with meaning, unit and default. Plain data: no torch, no Megatron.

Defaults are the mid-training values of the official ReFINE code (arXiv 2602.16704). Where they
leave the paper's wording: `clip_grad` is 1.0 (the paper's table says 0.2, which its code uses for
the PPO clip only), `entropy_of` is the rollout token, and the margins and the zero padding that
counts in the entropy pooling are in the code alone. The default mode is `fused` (one optimizer step
per batch); the published schedule of several is `two_phase`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Limit:
    """A bound on a number: `holds(value)` must be true; `text` tells the user ("at least 1")."""

    holds: Callable[[float], bool]
    text: str


PositiveInt = Annotated[int, Limit(lambda x: x >= 1, "at least 1")]
NonNegativeInt = Annotated[int, Limit(lambda x: x >= 0, "at least 0")]
PositiveFloat = Annotated[float, Limit(lambda x: x > 0, "greater than 0")]
NonNegativeFloat = Annotated[float, Limit(lambda x: x >= 0, "at least 0")]
Fraction = Annotated[float, Limit(lambda x: 0 <= x < 1, "at least 0 and below 1")]
Share = Annotated[float, Limit(lambda x: 0 < x <= 1, "greater than 0 and at most 1")]
AboveOne = Annotated[float, Limit(lambda x: x > 1, "greater than 1")]


@dataclass(frozen=True)
class ModelConfig:
    """Which model. A preset gives the architecture, a checkpoint its weights too; one is needed, or
    checkpoint.load."""

    # Name of a preset architecture; without a checkpoint its weights start at random.
    preset: str | None = None
    # Checkpoint (directory) to take the weights from, converted or of a training run, of whose
    # checkpoints/ it is the newest at the start; a preset given as well must agree with it, the
    # overrides on both. A run that has checkpoints of its own needs it no more.
    checkpoint: str | None = None
    # Architecture fields set over the preset, by dotted name (`mixer.chunk_size: 512`); nested
    # mappings mean the same.
    overrides: dict[str, Any] = field(default_factory=dict)
    # Build the parallel linears and norms from Transformer Engine (GPU machines that have it)
    # instead of Megatron's own torch layers.
    transformer_engine: bool = False
    # LaCT: precision of the large products of its chunks (reading the fast weights, the gradients
    # they are written with); states, rates, norms and sums are float32 in any case. null: the dtype
    # of the activations, as the published code under autocast (bfloat16 in a bfloat16 run). tf32:
    # on GPUs; elsewhere float32.
    fast_weight_matmul: Literal["float32", "tf32", "bfloat16"] | None = None


@dataclass(frozen=True)
class DataConfig:
    """Long documents; in post-training and test-time training prompts with answers. Relative paths
    start at the working directory."""

    # Text files: `.jsonl` with a `text` field in every line, or `.txt` holding one document each.
    # Of prompts with answers: `.jsonl` or `.parquet` with `prompt` and `answer` or `answers` (a
    # text or a list; the first is the one to train on). Training needs one at least.
    paths: tuple[str, ...] = ()
    # The tokenizer that the model was made with: a SentencePiece model, a `tokenizer.json`, or a
    # Hugging Face directory that has one. null: the one that model.checkpoint carries.
    tokenizer: str | None = None
    # Rows that the model's vocabulary may have beyond the tokenizer's pieces: vocabularies are
    # padded to round sizes.
    unused_vocabulary: NonNegativeInt = 512
    # Tokens per window. Of a prompt with its answer the most: prompts leave max_answer_tokens of
    # it, and padding behind makes all as long.
    sequence_length: PositiveInt = 16384
    # documents: short documents, and what full windows leave of long ones, share windows, each with
    # a state, positions and targets of its own; prompts with their answers likewise. none: a window
    # lies within one document, whose remainder is dropped, and an example has a row of its own.
    packing: Literal["none", "documents"] = "none"
    # Where the tokens of documents are kept: runs that name the same directory tokenize the same
    # documents once. null: RUN/data.
    cache: str | None = None
    # Seed of the order of the windows or examples (each epoch has its own order).
    seed: NonNegativeInt = 1234
    # Most tokens of an answer; what is longer is cut.
    max_answer_tokens: PositiveInt = 32
    # Let EOS follow an answer, one of its tokens.
    answer_eos: bool = False


@dataclass(frozen=True)
class RefineConfig:
    """The ReFINE objective and how a step computes it."""

    # ntp: next-token loss only. fused: rollouts branched from the one forward, one optimizer step
    # per batch. two_phase: stored rollouts, several optimizer steps per batch. prefix_copy: the
    # published schedule, for reference.
    mode: Literal["ntp", "fused", "two_phase", "prefix_copy"] = "fused"

    # c: equal chunks per sequence, one rollout position drawn in each.
    num_chunks: PositiveInt = 8
    # k: tokens per rollout.
    rollout_tokens: PositiveInt = 5
    # Nats by which the length of a rollout is chosen: it ends where the entropies of the text along
    # it add up to as many, after rollout_tokens at the latest. What is rolled out beyond counts
    # neither in reward nor loss. null: all rollouts have rollout_tokens.
    rollout_entropy: PositiveFloat | None = None
    # n: rollouts per position.
    rollouts_per_position: PositiveInt = 1
    # How the position in a chunk is chosen: by the softmax of the smoothed entropy, evenly, or at
    # the raw extreme.
    selection: Literal["entropy", "uniform", "argmax", "argmin"] = "entropy"
    # Whose entropy weighs a position: that of the first rollout token, or of the last prefix token
    # (the paper's Eq. 5).
    entropy_of: Literal["rollout_token", "prefix_token"] = "rollout_token"
    # Temperature of the softmax.
    selection_temperature: PositiveFloat = 1.0
    # Tokens the entropy is averaged over before the softmax (even values pool over one more); null:
    # rollout_tokens.
    smoothing_window: PositiveInt | None = None
    # Divide the pooled entropy by the number of valid positions in the window instead of by its
    # width.
    pooling_ignores_padding: bool = False
    # Fewest tokens before a position, and after it: positions outside are clamped. In tokens.
    margin_left: PositiveInt = 20
    margin_right: PositiveInt = 20
    # Temperature of the rollouts' sampling.
    rollout_temperature: PositiveFloat = 1.0

    # R: hidden-state cosine, token match, their weighted sum, normalised token edit similarity, or
    # how much likelier the text behind the rolled-out span becomes when the rollout stands in it.
    reward: Literal["cosine", "binary", "hybrid", "edit", "future"] = "cosine"
    # m: text tokens behind the span that the reward future reads; margin_right must leave k + m.
    future_tokens: PositiveInt = 10
    # Weights of cosine and binary in the hybrid reward.
    reward_weights: tuple[NonNegativeFloat, NonNegativeFloat] = (1.0, 1.0)
    # Which rollouts share a baseline: one per position of a sequence, the n of one position, or all
    # c * n of a sequence.
    grouping: Literal["sequence", "position", "joint"] = "sequence"
    # Divide advantages by the group's standard deviation plus advantage_eps.
    normalize_std: bool = True
    advantage_eps: PositiveFloat = 1e-6

    # PPO clip: the probability ratio stays in [1 - clip_low, 1 + clip_high].
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.2
    # Bound of the loss at negative advantages, in multiples of the advantage.
    dual_clip: AboveOne = 3.0
    # How token losses become one number.
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = "token-mean"
    # Total loss = ntp_weight * NTP + policy_weight * policy (lambda_SFT, lambda_RL).
    ntp_weight: NonNegativeFloat = 1.0
    policy_weight: NonNegativeFloat = 0.2

    # Share of the texts of each optimizer step that roll out; the others train on the next-token
    # loss alone. It must come to whole micro-batches on every rank.
    rollout_fraction: Share = 1.0

    # Sequences per optimizer step in two_phase, and in ntp as its baseline (other modes take the
    # whole batch); null: global_batch_size.
    mini_batch_size: PositiveInt | None = None

    @property
    def tokens_behind(self) -> int:
        """Text tokens behind a rollout that its reward reads: m of the reward future, else 0."""
        return self.future_tokens if self.reward == "future" else 0


@dataclass(frozen=True)
class PosttrainConfig:
    """Post-training on prompts with answers: of every batch an inner update on the prompts, as
    `refine` says, and an outer one on the answers."""

    # false: the outer update alone (SFT).
    inner: bool = True


@dataclass(frozen=True)
class TTTConfig:
    """Test-time training: adapt to the prompts of a batch as `refine` says, then answer them."""

    # When weights and optimizer state go back to those of the beginning: after every example, which
    # then adapts alone, after every batch, or (none) only where another file begins, with which a
    # batch begins too.
    reset: Literal["none", "batch", "example"] = "batch"


@dataclass(frozen=True)
class EvaluationConfig:
    """Figures of held-out texts during training, in metrics.jsonl and TensorBoard."""

    # Steps between evaluations; null: none.
    every: PositiveInt | None = None
    # Files of held-out documents, for next-token loss and accuracy by position.
    paths: tuple[str, ...] = ()
    # How many of the documents, and how many tokens of each; null: data.sequence_length.
    texts: PositiveInt = 8
    text_length: PositiveInt | None = None
    # Tokens of needles in haystacks (RULER's four kinds); null: none. How many of each kind.
    niah_length: PositiveInt | None = None
    niah_rows: PositiveInt = 4


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Schedule lengths are in steps of the run (batches)."""

    lr: PositiveFloat = 1e-6
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    # Largest global gradient norm; 0 switches clipping off.
    clip_grad: NonNegativeFloat = 1.0
    # The learning rate rises linearly from 0 over this many steps.
    lr_warmup_steps: NonNegativeInt = 0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    # Step at which the decay ends at min_lr; null: training.steps.
    lr_decay_steps: PositiveInt | None = None
    min_lr: NonNegativeFloat = 0.0
    # Shard the optimizer state over data-parallel ranks.
    use_distributed_optimizer: bool = False
    # Reduce gradients over data-parallel ranks while the last backward pass still runs.
    overlap_grad_reduce: bool = False
    # Gather updated parameters during the next forward pass; needs the distributed optimizer and
    # overlap_grad_reduce.
    overlap_param_gather: bool = False
    # Let the layers add the gradients of their weights to the buffer where they gather, where that
    # can be done; false: a tensor for each gradient, in the dtype of the weights.
    gradient_accumulation_fusion: bool = True


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch and precision."""

    # Batches of the whole run, NTP warm-up included; one line of metrics each.
    steps: PositiveInt = 100
    # Of a run of mode ntp, a baseline: take as many steps as have the floating-point operations of
    # `steps` steps of this mode, with `refine` as it is for the rest; said at the start. null: as
    # many steps.
    equal_flops: Literal["fused", "two_phase"] | None = None
    # Leading steps that train on the next-token loss alone.
    ntp_warmup_steps: NonNegativeInt = 0
    # Sequences per forward pass on one rank.
    micro_batch_size: PositiveInt = 1
    # Sequences per step over all ranks.
    global_batch_size: PositiveInt = 128
    # Optimizer steps in a row that may be skipped because the loss or the gradient is not finite;
    # one more ends the run, with a checkpoint of the weights as they were. 0: the first one does.
    max_skipped_steps: NonNegativeInt = 3
    # Seed of weights, positions and rollouts.
    seed: NonNegativeInt = 1234
    # Precision of weights and activations; states, losses and rewards are at least float32.
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    # Steps between log lines where there is no progress bar.
    log_interval: PositiveInt = 1
    # Tokens between the states that delta-rule layers keep for branching, a multiple of 64: a
    # larger one takes less memory and reads the writes of more tokens for each branch. null:
    # four states for each rollout position of a text, and 512 tokens at most between them.
    tape_interval: PositiveInt | None = None
    # Activations to make again in the backward instead of keeping them. selective: the outputs of
    # norms, gates, short convolutions, rotations and activations, and LaCT's Newton-Schulz; about
    # half of the memory is left. full: each slice's whole forward runs again before its backward.
    recompute: Literal["selective", "full"] | None = None
    # On CUDA replay the decode passes of rollouts as CUDA graphs, where one rank has the whole
    # model. Rollouts of LaCT that reach the end of a chunk are run operation by operation.
    decode_graphs: bool = True


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of Megatron's groups; what is left of the ranks is data parallel."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    # Shard the activations between tensor-parallel blocks over the sequence.
    sequence_parallel: bool = False
    # Slices of the sequence that the pipeline passes on one by one. Those longer than a chunk of
    # the model end with one, so there may be fewer. null: as many as the plan of the step gains
    # from, of at least 512 tokens and a LaCT chunk each; without a pipeline 1, or with recompute as
    # many as there are.
    slices: PositiveInt | None = None
    # Layers of each pipeline stage; null: spread evenly, the first stages take what is left over.
    layers_per_stage: tuple[PositiveInt, ...] | None = None
    # Seconds that a rank waits for the others in a collective or message before the job fails. On
    # GPUs more than a step takes: messages are awaited from its beginning on.
    timeout: PositiveFloat = 600.0


@dataclass(frozen=True)
class KernelsConfig:
    """Which form of an operation runs; the log says at its first call which one does."""

    # auto: triton or flash on GPUs, torch elsewhere. These two: torch where the kernels do not fit,
    # and where they disagree with torch at their first call.
    # Attention of a text, also within LaCT. flash: FlashAttention as torch brings it.
    attention: Literal["auto", "torch", "flash"] = "auto"
    # Attention of rollouts, over the text that they left and their own tokens.
    branches: Literal["auto", "torch", "triton"] = "auto"
    # Delta rules, over a text and a token at a time. fla: flash-linear-attention over texts whose
    # states nobody reads, triton elsewhere.
    delta_rule: Literal["auto", "torch", "triton", "fla"] = "auto"
    # What LaCT computes between its products, its fast queries and keys and Newton-Schulz in
    # bfloat16 among it.
    lact: Literal["auto", "torch", "triton"] = "auto"
    # RMS norms, gated or not.
    rms_norm: Literal["auto", "torch", "triton"] = "auto"
    # Rotary positions.
    rotary: Literal["auto", "torch", "triton"] = "auto"
    # Short causal convolutions.
    short_conv: Literal["auto", "torch", "triton"] = "auto"
    # The activation of MLPs.
    swiglu: Literal["auto", "torch", "triton"] = "auto"
    # Log-probabilities, entropies and samples of rows of logits.
    vocabulary: Literal["auto", "torch", "triton"] = "auto"


@dataclass(frozen=True)
class CheckpointConfig:
    """Training checkpoints (weights, optimizer, data position) under RUN/checkpoints."""

    # Training checkpoint of another run to go on from: its weights, optimizer state, step and place
    # in the data.
    load: str | None = None
    # Steps between checkpoints; the last step is always saved.
    save_interval: PositiveInt = 50
    # Write checkpoints in the background while training goes on.
    async_save: bool = False
    # Newest checkpoints to keep; null: all.
    keep_last: PositiveInt | None = None
    # Keep those of every so many steps too, whatever keep_last says; null: none for that.
    keep_every: PositiveInt | None = None
    # auto: go on from RUN's own last checkpoint if there is one. never: RUN must be new or empty.
    resume: Literal["auto", "never"] = "auto"
    # Go on although the checkpoint was trained on other files, windows, seeds or batches.
    allow_other_data: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Where results go and what is shown."""

    # RUN: configuration, metrics, TensorBoard events, checkpoints and the Hugging Face files that
    # go into each of them.
    directory: str = "runs/refine"
    tensorboard: bool = True
    # Progress bar on a terminal (log lines elsewhere); false: neither.
    progress: bool = True


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    posttrain: PosttrainConfig = field(default_factory=PosttrainConfig)
    ttt: TTTConfig = field(default_factory=TTTConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
