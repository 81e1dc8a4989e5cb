"""Stock Megatron on two gloo ranks computes what plain PyTorch computes on one.

The model is a two-layer MLP of Megatron's parallel linears. Reference for everything is `_Plain`:
the same weights in torch, all of the batch, torch's AdamW.
"""

from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
)
from megatron.core.transformer import MegatronModule, TransformerConfig

from refine_mcore import compat, platform
from refine_mcore.training.optimizer_state import load_optimizer_state, sharded_optimizer_state
from tests.distributed.harness import run_distributed

SEQUENCE, BATCH, WIDTH, INNER = 3, 4, 8, 16
LEARNING_RATE, CLIP = 1e-2, 0.05


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    run_distributed(_all_cases, 2, tmp_path)


def _all_cases(directory: Path) -> None:
    _check_parallel_linears()
    _check_random_regions()
    _check_pipeline()
    _check_training_across_layouts(directory)
    _check_a_layout_leaves_nothing_behind()


def _check_a_layout_leaves_nothing_behind() -> None:
    """Of threads, which every group has; not even where a model of the layout is in a cycle."""
    threads = []
    for _ in range(3):
        groups: list[Any] = [platform.initialize_model_parallel(tensor=2)]
        groups.append(groups)
        dist.barrier()
        threads.append(psutil.Process().num_threads())
        del groups
    assert max(threads) == min(threads)


def _check_parallel_linears() -> None:
    """Outputs, input gradients and WEIGHT gradients of column and row parallel linears, in fp64."""
    groups = platform.initialize_model_parallel(tensor=2)
    plain = _Plain(torch.float64)
    model = _Mlp(_config(params_dtype=torch.float64, tensor_model_parallel_size=2), groups, plain)
    inputs = _batch(0, torch.float64).requires_grad_()
    expected_inputs = inputs.detach().clone().requires_grad_()
    output, expected = model(inputs), plain.forward(expected_inputs)
    output.square().sum().backward()
    expected.square().sum().backward()

    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(inputs.grad, expected_inputs.grad)
    rank = groups.tp.rank()
    for parameter, full in zip(model.parameters(), plain.parameters(), strict=True):
        assert full.grad is not None
        torch.testing.assert_close(parameter.grad, _shard(full.grad, parameter.shape, rank))


def _check_random_regions() -> None:
    """Tensor-parallel regions draw differently on each rank and leave the common state alone."""
    platform.initialize_model_parallel(tensor=2, seed=5)
    common = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        own = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), common)
    gathered = [torch.empty(4), torch.empty(4)]
    dist.all_gather(gathered, own)
    assert not torch.equal(gathered[0], gathered[1])
    dist.all_gather(gathered, torch.rand(4))
    assert torch.equal(gathered[0], gathered[1])


def _check_pipeline() -> None:
    """Megatron's 1F1B over two stages: the weight gradients of four micro-batches."""
    groups = platform.initialize_model_parallel(pipeline=2)
    config = _config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    plain = _Plain()
    stage = _Stage(config, plain, groups.pp.rank())
    _run_schedule(stage, [_batch(index) for index in range(4)])
    for index in range(4):
        (plain.forward(_batch(index)).square().sum() / 4).backward()
    weight, bias = (plain.parameters()[:2], plain.parameters()[2:])[groups.pp.rank()]
    torch.testing.assert_close(stage.linear.weight.grad, weight.grad)
    torch.testing.assert_close(stage.linear.bias.grad, bias.grad)


def _check_training_across_layouts(directory: Path) -> None:
    """Two steps at TP 2, save, load at TP 1 x DP 2, a third step: parameters and gradient norms.

    Covers DDP, DistributedOptimizer, clipping, `torch_dist` checkpoints and the repairs that
    resuming needs: with a wrong Adam step count the third step lands elsewhere.
    """
    plain = _Plain()
    groups = platform.initialize_model_parallel(tensor=2)
    model, optimizer = _training(groups, tensor=2, plain=plain)
    for step in range(2):
        _step_and_compare(model, optimizer, plain, step)
    dist_checkpointing.save(_sharded_state(model, optimizer, is_loading=False), str(directory))

    groups = platform.initialize_model_parallel()
    model, optimizer = _training(groups, tensor=1, plain=_Plain(seed=99))
    template = _sharded_state(model, optimizer, is_loading=True)
    state = dist_checkpointing.load(template, str(directory))
    model.module.load_state_dict(state["model"])
    load_optimizer_state(optimizer, template["optimizer"], state["optimizer"])
    _step_and_compare(model, optimizer, plain, step=2)


def _training(groups: Any, tensor: int, plain: "_Plain") -> tuple[Any, Any]:
    config = _config(tensor_model_parallel_size=tensor)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True
    )
    model = DistributedDataParallel(config, ddp_config, _Mlp(config, groups, plain))
    optimizer_config = OptimizerConfig(
        lr=LEARNING_RATE, weight_decay=0.0, clip_grad=CLIP, use_distributed_optimizer=True
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = model.no_sync
    return model, get_megatron_optimizer(optimizer_config, [model])


def _step_and_compare(model: Any, optimizer: Any, plain: "_Plain", step: int) -> None:
    """One step of both on the same two micro-batches; a data-parallel rank takes its half."""
    world, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    batches = [_batch(10 * step + index) for index in range(2)]
    model.zero_grad_buffer()
    optimizer.zero_grad()
    _run_schedule(model, [batch.chunk(world, dim=1)[rank] for batch in batches])
    updated, grad_norm, _ = optimizer.step()
    assert updated

    expected_norm = plain.train_step(batches, divide_by=len(batches) * world)
    torch.testing.assert_close(torch.as_tensor(grad_norm), expected_norm)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    for parameter, full in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.detach(), _shard(full.detach(), parameter.shape, tensor_rank)
        )


def _sharded_state(model: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    weights = model.module.sharded_state_dict(metadata=compat.checkpoint_metadata())
    return {
        "model": weights,
        "optimizer": sharded_optimizer_state(optimizer, weights, is_loading=is_loading),
    }


def _run_schedule(model: Any, batches: list[torch.Tensor]) -> None:
    """Forward and backward of the sum of squares over `batches` by Megatron's own schedule."""

    def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        return model(next(data_iterator)), lambda output: (output.square().sum(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=batches[0].shape[1],
        forward_only=False,
    )


def _config(**overrides: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=2, hidden_size=WIDTH, num_attention_heads=2, **overrides)


def _batch(index: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randn(SEQUENCE, BATCH, WIDTH, generator=generator, dtype=dtype)


def _shard(full: torch.Tensor, shape: torch.Size, rank: int) -> torch.Tensor:
    """The part of `full` that rank holds as `shape`: split along the one axis that differs."""
    for axis, (length, whole) in enumerate(zip(shape, full.shape, strict=True)):
        if length != whole:
            return full.narrow(axis, rank * length, length)
    return full


class _Plain:
    """The MLP and its training in plain torch."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(INNER, WIDTH), (INNER,), (WIDTH, INNER), (WIDTH,)]
        self._parameters = [
            (torch.randn(shape, generator=generator, dtype=dtype) / 4).requires_grad_()
            for shape in shapes
        ]
        self._adam = torch.optim.AdamW(self._parameters, LEARNING_RATE, weight_decay=0.0)

    def parameters(self) -> list[torch.Tensor]:
        return self._parameters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight_in, bias_in, weight_out, bias_out = self._parameters
        return F.linear(F.gelu(F.linear(x, weight_in, bias_in)), weight_out, bias_out)

    def train_step(self, batches: list[torch.Tensor], divide_by: int) -> torch.Tensor:
        self._adam.zero_grad()
        for batch in batches:
            (self.forward(batch).square().sum() / divide_by).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._adam.step()
        return norm


class _Mlp(MegatronModule):
    """The MLP of Megatron's linears, with the weights of a `_Plain`."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, groups: Any, plain: _Plain) -> None:
        super().__init__(config)
        common: dict[str, Any] = {
            "config": config,
            "init_method": torch.nn.init.zeros_,
            "bias": True,
            "skip_bias_add": False,
            "tp_group": groups.tp,
        }
        self.fc1 = ColumnParallelLinear(WIDTH, INNER, gather_output=False, **common)
        self.fc2 = RowParallelLinear(INNER, WIDTH, input_is_parallel=True, **common)
        with torch.no_grad():
            for parameter, full in zip(self.parameters(), plain.parameters(), strict=True):
                parameter.copy_(_shard(full, parameter.shape, groups.tp.rank()))

    def set_input_tensor(self, tensor: Any) -> None:
        """Part of what schedules ask of a model; a single stage receives nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)[0]))[0]


class _Stage(MegatronModule):
    """One of the MLP's two linears as a pipeline stage; INNER values travel between them."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, plain: _Plain, rank: int) -> None:
        config.hidden_size = INNER
        super().__init__(config)
        self.rank = rank
        self.received: torch.Tensor | None = None
        weight, bias = (plain.parameters()[:2], plain.parameters()[2:])[rank]
        self.linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)

    def set_input_tensor(self, tensors: Any) -> None:
        self.received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rank == 0:
            return F.gelu(self.linear(x))
        return self.linear(self.received)
